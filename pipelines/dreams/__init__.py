"""Dreams: synthetic sequences that the awake model makes of experience, judged against real text and chosen."""

from typing import TYPE_CHECKING

from nl_model.lazy import face

if TYPE_CHECKING:
    from pipelines.dreams.dream import Dream
    from pipelines.dreams.file import read_dreams, write_dreams

__all__ = [
    "Dream",
    "read_dreams",
    "write_dreams",
]
__getattr__ = face(
    __name__,
    {
        "Dream": "dream",
        "read_dreams": "file",
        "write_dreams": "file",
    },
)

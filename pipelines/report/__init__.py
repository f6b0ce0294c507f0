"""What people see of a run: the journal, the audit log, MLflow, tables, plots, one page that opens offline."""

from typing import TYPE_CHECKING

from nl_model.lazy import face

if TYPE_CHECKING:
    from pipelines.report.audit import AuditLog
    from pipelines.report.events import EventLog, read_events
    from pipelines.report.page import write_report

__all__ = [
    "AuditLog",
    "EventLog",
    "read_events",
    "write_report",
]
__getattr__ = face(
    __name__,
    {
        "AuditLog": "audit",
        "EventLog": "events",
        "read_events": "events",
        "write_report": "page",
    },
)

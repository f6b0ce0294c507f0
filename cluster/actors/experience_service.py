"""Actor `ExperienceService`: the only committer of the experience store. Group commit: one fsync for all who wait."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from pipelines.config.schema import StoreConfig
from pipelines.dreams.file import read_dreams
from pipelines.experience import ExperienceStore, Record

Waiting = Tuple[List[Record], Optional[Dict[str, Any]], "asyncio.Future[int]"]
logger = logging.getLogger(__name__)


class ExperienceService:
    """Owns the store's writer. Appends that arrive while a commit is under way share the next one."""

    def __init__(self, path: str, context: int, dtype: str, cfg: StoreConfig) -> None:
        self.store = ExperienceStore.open(Path(path), context, np.dtype(dtype), cfg)
        self.waiting: List[Waiting] = []
        self.committing: Optional[asyncio.Task[None]] = None

    async def append(self, records: List[Record], cursor: Optional[Dict[str, Any]] = None) -> int:
        """Make records durable together with the cursor behind them; returns the store version that holds them.

        Records whose keys are there already change nothing. Raises StoreFullError, ValueError for gaps in the keys.
        """
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.waiting.append((records, cursor, future))
        if self.committing is None or self.committing.done():
            self.committing = asyncio.create_task(self._commit())
        return await future

    async def append_dreams(self, directory: str) -> int:
        """Make the dreams that a release brought along durable; returns the store version that holds them."""
        return await self.append(read_dreams(Path(directory)))

    async def _commit(self) -> None:
        while self.waiting:
            group, self.waiting = self.waiting, []
            try:
                for records, cursor, _ in group:
                    self.store.append(records, cursor)
                version = await asyncio.get_running_loop().run_in_executor(None, self.store.commit)
            except (OSError, ValueError) as error:
                logger.error("commit failed: %s", error)
                for *_, future in group:
                    future.set_exception(error)
                return
            for *_, future in group:
                future.set_result(version)

    async def status(self) -> Dict[str, Any]:
        """Version, last key, cursor and counters of the store."""
        store = self.store
        return {
            "version": store.version,
            "last_key": store.last_key,
            "rows": store.rows,
            "by_source": dict(store.by_source),
            "ignored": store.ignored,
            "cursor": store.cursor,
        }

    async def close(self) -> None:
        """Commit what waits and let go of the store."""
        if self.committing is not None:
            await self.committing
        self.store.close()

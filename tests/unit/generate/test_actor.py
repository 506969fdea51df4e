"""One actor with the rows of several sets. No model is run."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pyarrow as pa

from cai_ray.cluster.usage import Usage
from cai_ray.engine.protocol import Engine
from cai_ray.generate.actor import ChainActor
from cai_ray.generate.journal import Journal
from cai_ray.storage.records import Judgement, derive_id
from cai_ray.storage.run import Run
from cai_ray.town import BASE
from tests.ray.engines import town_config


class Held:
    """Notes the rows that it walks, in the order in which they end. The row "slow" ends when it is let."""

    def __init__(self) -> None:
        self.began, self.may_end, self.ended = asyncio.Event(), asyncio.Event(), list[str]()

    async def __call__(self, engine: Engine, row: dict[str, Any]) -> dict[str, Any]:
        if row["family"] == "slow":
            self.began.set()
            await self.may_end.wait()
        self.ended.append(row["family"])
        return {**row, "response": "fine", "usage": Usage(1, 0, 1)._asdict()}


def test_an_engine_is_changed_when_no_row_of_its_model_is_under_way(tmp_path: Path) -> None:
    run = Run(town_config(out=str(tmp_path), engine={"kind": "scripted", "max_num_seqs": 8}))
    rows = {
        name: [{"id": derive_id(name), "messages": [{"role": "user", "content": name}], "family": name}]
        for name in ("slow", "next")
    }
    models = {"slow": run.resolve_model("base"), "next": run.resolve_model(str(BASE))}
    journals = {name: Journal(run, "evaluate", Judgement, Judgement, name) for name in rows}
    slices = {name: journals[name].plan(rows[name], 8)[0] for name in rows}

    async def scenario() -> None:
        chain = Held()
        actor = ChainActor(chain, models, journals, gpu=False)

        async def process(name: str) -> None:
            async for outcomes in actor(pa.Table.from_pylist([slices[name]._asdict()])):
                assert outcomes["error"].to_pylist() == [None]

        slow = asyncio.create_task(process("slow"))
        await chain.began.wait()
        following = asyncio.create_task(process("next"))
        await asyncio.wait([following], timeout=0.5)
        assert actor.model == models["slow"] and chain.ended == []
        chain.may_end.set()
        await asyncio.gather(slow, following)
        assert actor.model == models["next"] and chain.ended == ["slow", "next"]

    asyncio.run(scenario())

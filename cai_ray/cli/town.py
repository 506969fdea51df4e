"""`cai-ray town`: train the embedded world's base model, and measure its skills."""

import json
from typing import Annotated

import typer

from cai_ray.cli.options import new_app

app = new_app("Train the embedded world's base model again, or measure its skills.")


@app.command("build")
def build(
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Folder of the model.")],
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the training.")] = 0,
) -> None:
    """Train the base model from scratch."""
    from cai_ray.studies import train_base

    print(json.dumps(train_base.build(out, seed=seed)))


@app.command("check")
def check(
    model: Annotated[
        str, typer.Option("--model", metavar="DIR", help="Model folder.", show_default="the shipped one")
    ] = "town",
) -> None:
    """Measure the skills of critic and judge on development pairs."""
    from cai_ray.studies import check_base
    from cai_ray.town import BASE

    print(json.dumps(check_base.check(str(BASE) if model == "town" else model)))

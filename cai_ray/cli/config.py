"""`cai-ray config`: what may stand in a configuration, for editors and for people."""

import json

from cai_ray.cli.options import new_app

app = new_app("Describe the settings of a configuration.")


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of a configuration, for editors."""
    from cai_ray.config.schema import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command("docs")
def docs() -> None:
    """Print docs/configuration.md: every setting, its default and its meaning."""
    from cai_ray.config.schema import markdown

    print(markdown(), end="")


@app.command("models")
def models() -> None:
    """Print docs/models.md: what works with which family of models."""
    from cai_ray.train.families.page import markdown

    print(markdown(), end="")

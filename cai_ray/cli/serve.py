"""Commands that ask a run's policy: `cai-ray chat` in the terminal, `cai-ray serve` over HTTP."""

import json
from typing import Annotated, Any

import typer

from cai_ray.cli.options import RunFolder, listed, port
from cai_ray.errors import InputError
from cai_ray.stages import Policy


def chat(
    run: RunFolder,
    model: Annotated[Policy, typer.Option("--model", help="Which policy.")] = "rl",
) -> int:
    """Talk to a run's policy."""
    from cai_ray import chat
    from cai_ray.storage.run import open_run

    return chat.run(open_run(run), model)


def _host(text: str) -> str:
    # To a socket, no name at all means every address of the machine.
    if not text.strip():
        raise ValueError("is empty; 127.0.0.1 is this machine alone, 0.0.0.0 all of its addresses")
    return text


def serve(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="Run directory. It may be left out with --update-constitution and --add-token.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", metavar="HOST", parser=_host, help="Address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="PORT", parser=port, help="Port to listen on.")
    ] = 8000,
    models: Annotated[
        str | None,
        typer.Option(
            "--models",
            metavar="NAME,…",
            help="Policies to serve, of base, sl and rl.",
            show_default="the one furthest in training",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", metavar="NAME=FOLDER", help="A LoRA adapter on the first model; may be repeated."
        ),
    ] = None,
    token_file: Annotated[
        str | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help="File of keys, or of one token.",
            show_default="the token in CAI_RAY_TOKEN",
        ),
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Serve without a token; on loopback only.")
    ] = False,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write the texts of requests to the log.")
    ] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            "--metrics-port",
            metavar="PORT",
            parser=port,
            help="Port where Prometheus reads metrics.",
            show_default="Ray's choice",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a setting; docs/serving.md lists them all."
        ),
    ] = None,
    write_config: Annotated[
        str | None,
        typer.Option(
            "--write-config", metavar="FILE", help="Write a file for `serve deploy` and start nothing."
        ),
    ] = None,
    update_constitution: Annotated[
        str | None,
        typer.Option(
            "--update-constitution",
            metavar="FILE",
            help="Give a new constitution to the servers of RUN, or to the one at --host and --port.",
        ),
    ] = None,
    add_token: Annotated[
        str | None,
        typer.Option(
            "--add-token", metavar="NAME", help="Print a new token and add its hash to --token-file."
        ),
    ] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="Let the new token of --add-token change the constitution.")
    ] = False,
) -> None:
    """Serve the policy and critic endpoints of a run."""
    from cai_ray.serve import keys

    if add_token is not None:
        if not token_file:
            raise InputError(f"--add-token {add_token}: name the file for its hash with --token-file")
        print(keys.add_key(token_file, add_token, admin))
        return
    from cai_ray.serve import app, settings

    if update_constitution is not None:
        token = None if no_auth or run else keys.read_token()
        print(json.dumps(app.update_constitution(update_constitution, run, host, port, token)))
        return
    if run is None:
        raise InputError("serve: give a run's directory")
    values: dict[str, Any] = {
        "run": run,
        "keys": keys.read_keys(token_file, no_auth=no_auth, host=host),
        "no_auth": no_auth,
        "log_prompts": log_prompts,
    }
    if models:
        values["models"] = listed(models)
    if adapter:
        values["adapters"] = dict(_name_and_folder(item) for item in adapter)
    serving = settings.load(values, overrides or [])
    if write_config is not None:
        app.write_config(serving, host, port, write_config)
        print(write_config)
        return
    app.serve(serving, host, port, metrics_port)


def _name_and_folder(item: str) -> tuple[str, str]:
    name, equals, folder = item.partition("=")
    if not (name and equals and folder):
        raise InputError(f"--adapter {item}: write it as NAME=FOLDER")
    return name, folder

"""`python -m deploy.render kubernetes|bentocloud|compose|run|ray`: manifests for chosen models.

What they say of GPUs, memory, probes, grace periods and scaling follows from the models' configs
and from `TRIPTYCH_*` as it is set here, which is handed on. The same choice renders the same text.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import yaml

from deploy.bentocloud import deployment
from deploy.compose import compose_file, run_command
from deploy.kubernetes import manifests
from deploy.plan import Options, Plan, make_plan
from deploy.ray_serve import serve_config
from runners.contracts.errors import ConfigError
from settings import Settings, get_settings, variable

PROMETHEUS = "http://prometheus-operated.monitoring.svc:9090"
NAME = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"
SECRETS = {
    "kubernetes": "the Secret whose entry api-key is the API key",
    "bentocloud": "the secret whose TRIPTYCH_API_KEY is the API key",
}
KEYS = {
    **dict.fromkeys(SECRETS, "say with --api-key-secret where the deployment finds it"),
    **dict.fromkeys(("compose", "run"), "say --api-key, which hands it through"),
    "ray": "set it where the cluster's machines are started, whose replicas inherit it",
}


class _Dumper(yaml.SafeDumper):
    """Without references: what occurs twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _yaml(content: object) -> str:
    documents = content if isinstance(content, list) else [content]
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=100)


RENDERERS: dict[str, tuple[str, Callable[[Plan], str]]] = {
    "kubernetes": ("manifests for kubectl apply", lambda plan: _yaml(manifests(plan))),
    "bentocloud": ("a file for bentoml deploy -f", lambda plan: _yaml(deployment(plan))),
    "compose": ("a Compose file", lambda plan: _yaml(compose_file(plan))),
    "run": ("a docker run command", lambda plan: run_command(plan) + "\n"),
    "ray": ("a config file for serve deploy", lambda plan: _yaml(serve_config(plan))),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print what was asked for; returns the exit code: 0, 1 with a sentence. Bad usage exits 2."""
    args = vars(_parser().parse_args(argv))
    _, render = RENDERERS[args["target"]]
    try:
        known = {field.name for field in fields(Options)}
        options = Options(**{k: v for k, v in args.items() if k in known and v is not None})
        text = render(make_plan(options, _settings(args, options)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    sys.stdout.write(text)
    return 0


def _settings(args: dict[str, Any], options: Options) -> Settings:
    """What is set here, and which models. Raises: ConfigError."""
    settings = get_settings()
    if settings.api_key is not None and not (options.api_key or options.api_key_secret):
        raise ConfigError(
            f"{variable('api_key')} is set here, and is never written down: unset it, or "
            f"{KEYS[args['target']]}"
        )
    models = {k: v for k in ("text_model", "image_model") if (v := args.get(k)) is not None}
    if models and options.bento:
        raise ConfigError(
            "a bento has its own models: leave out --bento and name its --image, or leave out "
            "--text-model and --image-model"
        )
    return settings.model_copy(update=models)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.render", description=(__doc__ or "").partition("\n\n")[2]
    )
    targets = parser.add_subparsers(dest="target", required=True, metavar="TARGET")
    for target, (meaning, _) in RENDERERS.items():
        options = targets.add_parser(target, help=meaning, allow_abbrev=False)
        add = options.add_argument
        add("--name", type=_name, help="what it is called (default: triptych)")
        if target != "ray":
            add("--bento", metavar="TAG", help="a bento of the store, with models in it")
        if target != "bentocloud":
            add(
                "--text-model", help="a tag of the store or a folder (default: TRIPTYCH_TEXT_MODEL)"
            )
            add("--image-model", help="the same (default: TRIPTYCH_IMAGE_MODEL)")
            add("--cpus", type=_count, help="CPU cores of a replica")
        if target in ("kubernetes", "compose", "run"):
            add("--image", help="the image to run (default: the bento's tag)")
            add("--memory", type=_count, metavar="GIB", help="memory of a replica")
            what = "a claim" if target == "kubernetes" else "a folder or a volume"
            add("--model-volume", help=f"{what} that holds a folder for each model, by its name")
        if target in ("compose", "run"):
            help_ = "hand TRIPTYCH_API_KEY through, as the shell has it then"
            add("--api-key", action="store_true", help=help_)
        elif target in SECRETS:
            add("--api-key-secret", metavar="NAME", help=SECRETS[target])
        if target not in ("compose", "run"):
            add("--replicas", type=_count, help="how many, or how many at least (default: 1)")
            add(
                "--max-replicas",
                type=_count,
                help="up to how many it scales (default: it does not)",
            )
        if target == "kubernetes":
            add("--namespace", type=_name, help="(default: default)")
            add("--autoscaler", choices=("keda", "hpa"), help="what scales it (default: keda)")
            help_ = "update replica by replica, where there is no room for one more"
            add("--no-surge", dest="surge", action="store_false", help=help_)
            add("--prometheus", default=PROMETHEUS, help="where KEDA asks (default: %(default)s)")
        if target == "bentocloud":
            add(
                "--instance-type", help="one of your BentoCloud's (default: it chooses by the GPUs)"
            )
    return parser


def _name(value: str) -> str:
    if not re.fullmatch(NAME, value):
        raise argparse.ArgumentTypeError("must be lower case letters, digits and hyphens, up to 40")
    return value


def _count(value: str) -> int:
    if not value.isdecimal() or not 0 < int(value) <= 10_000:
        raise argparse.ArgumentTypeError("must be a whole number from 1 to 10000")
    return int(value)


if __name__ == "__main__":
    sys.exit(main())

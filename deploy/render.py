"""`python -m deploy.render kubernetes|bentocloud|compose|run|ray`: manifests for chosen models.

GPUs, memory, probes, grace periods and scaling follow from the models' configs and from the
`TRIPTYCH_*` variables set here, which are passed on. The same choice renders the same text.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import yaml
from typing_extensions import override

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
    "kubernetes": "the Secret with the API key as its entry api-key",
    "bentocloud": "the secret with the API key as its entry TRIPTYCH_API_KEY",
}
KEY_ADVICE = {
    **dict.fromkeys(SECRETS, "name the deployment's secret with --api-key-secret"),
    **dict.fromkeys(("compose", "run"), "pass it through with --api-key, which writes no value"),
    "ray": "set it where the cluster's machines are started: replicas inherit it",
}


class _Dumper(yaml.SafeDumper):
    """Writes repeated values in full, without YAML anchors."""

    @override
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
    """Print the manifests. Returns 0, or 1 after an error on stderr; bad usage exits with 2."""
    args = vars(_parser().parse_args(argv))
    _, render = RENDERERS[args["target"]]
    try:
        names = {field.name for field in fields(Options)}
        options = Options(**{k: v for k, v in args.items() if k in names and v is not None})
        text = render(make_plan(options, _settings(args, options)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    sys.stdout.write(text)
    return 0


def _settings(args: dict[str, Any], options: Options) -> Settings:
    """The settings made here, with the models of the command line. Raises: ConfigError."""
    settings = get_settings()
    if settings.api_key is not None and not (options.api_key or options.api_key_secret):
        raise ConfigError(
            f"{variable('api_key')} is set here, and manifests never contain its value: unset it, "
            f"or {KEY_ADVICE[args['target']]}"
        )
    models = {k: v for k in ("text_model", "image_model") if (v := args.get(k)) is not None}
    if models and options.bento:
        raise ConfigError(
            "a bento has its models: leave out --bento and name its image with --image, or "
            "leave out --text-model and --image-model"
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
        add("--name", type=_name, help="name of the deployment (default: triptych)")
        if target != "ray":
            add("--bento", metavar="TAG", help="a bento of the store with models")
        if target != "bentocloud":
            for kind in ("text", "image"):
                default = variable(f"{kind}_model")
                help_ = f"a tag of the store or a folder (default: {default})"
                add(f"--{kind}-model", help=help_)
            add("--cpus", type=_count, help="CPU cores of a replica")
        if target in ("kubernetes", "compose", "run"):
            add("--image", help="the image to run (default: the bento's tag)")
            add("--memory", type=_count, metavar="GIB", help="memory of a replica")
            volume = "a claim" if target == "kubernetes" else "a folder or a volume"
            add("--model-volume", help=f"{volume} with one folder for each model, named after it")
        if target in ("compose", "run"):
            help_ = "pass through TRIPTYCH_API_KEY of the shell that starts the container"
            add("--api-key", action="store_true", help=help_)
        elif target in SECRETS:
            add("--api-key-secret", metavar="NAME", help=SECRETS[target])
        if target not in ("compose", "run"):
            add("--replicas", type=_count, help="number of replicas, or the smallest (default: 1)")
            help_ = "the largest number of replicas (default: no scaling)"
            add("--max-replicas", type=_count, help=help_)
        if target == "kubernetes":
            add("--namespace", type=_name, help="(default: default)")
            add("--autoscaler", choices=("keda", "hpa"), help="(default: keda)")
            help_ = "stop a replica before its update starts, if there are no GPUs for one more"
            add("--no-surge", dest="surge", action="store_false", help=help_)
            help_ = "address of Prometheus for KEDA (default: %(default)s)"
            add("--prometheus", default=PROMETHEUS, help=help_)
        if target == "bentocloud":
            add("--instance-type", help="(default: BentoCloud chooses by the number of GPUs)")
    return parser


def _name(value: str) -> str:
    if not re.fullmatch(NAME, value):
        raise argparse.ArgumentTypeError(
            "must be at most 40 lower-case letters, digits and hyphens, and begin with a letter"
        )
    return value


def _count(value: str) -> int:
    if not value.isdecimal() or not 0 < int(value) <= 10_000:
        raise argparse.ArgumentTypeError("must be a whole number from 1 to 10000")
    return int(value)


if __name__ == "__main__":
    sys.exit(main())

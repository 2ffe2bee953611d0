"""Command lines that answer a mistake with one line: typed flags by tyro, errors without a traceback."""

import contextlib
import dataclasses
import difflib
import io
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import tyro

from vlblocks.errors import UserError
from vlblocks.training.files import is_disk_full

__all__ = ["flag_value", "parse", "parse_config", "run_main"]

Config = TypeVar("Config")

_RULE = re.compile(r"[─━\-=+╭╮╰╯┌┐└┘|│]*")
# What torch puts around an exception that a loader's worker raised.
_FROM_WORKER = re.compile(r"Caught \w+ in .*\nOriginal Traceback", re.DOTALL)


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and exit with its code (None: 0).

    A UserError or a full disk prints one line, `error: ...`, to stderr and exits with 2; an interrupt exits with
    130. Any other exception is a bug of ours and keeps its traceback.
    """
    hook = threading.excepthook

    def quiet_when_full(thread_error: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread and raises the same error in the main one, where it is reported.
        if thread_error.exc_value is None or not is_disk_full(thread_error.exc_value):
            hook(thread_error)

    threading.excepthook = quiet_when_full
    try:
        code = main() or 0
    except UserError as error:
        code = _fail(_one_line(str(error)))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        if not is_disk_full(error):
            raise
        name = getattr(error, "filename", None)
        where = f"{name}: " if name else ""
        code = _fail(f"{where}the disk is full: free some space or choose another --out")
    sys.exit(code)


def _fail(message: str) -> int:
    # A progress bar may have left the cursor in its line.
    start = "\n" if sys.stderr.isatty() else ""
    print(f"{start}error: {message}", file=sys.stderr, flush=True)
    return 2


def _one_line(message: str) -> str:
    if _FROM_WORKER.match(message):
        message = message.strip().splitlines()[-1].split("UserError: ", 1)[-1]
    return " ".join(message.split())


def _flags(config: Any, prefix: str = "") -> list[str]:
    """Every flag that tyro makes of a dataclass instance and the dataclasses inside it."""
    flags = []
    for field in dataclasses.fields(config):
        name = prefix + field.name.replace("_", "-")
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            flags += _flags(value, f"{name}.")
        else:
            flags.append(f"--{name}")
            if isinstance(value, bool):
                head, _, last = name.rpartition(".")
                flags.append(f"--{head}.no-{last}" if head else f"--no-{last}")
    return flags


def _unknown(argument: str, default: Any) -> UserError:
    if not argument.startswith("-"):
        return UserError(f"unexpected argument {argument!r}: settings are flags, and --help lists them")
    flag = argument.split("=", 1)[0]
    known = _flags(default)
    near = difflib.get_close_matches(flag.replace("_", "-"), known, n=1)
    # A field's own name, given without its section.
    near = near or [name for name in known if name.rsplit(".", 1)[-1] == flag.removeprefix("--")][:1]
    hint = f"did you mean {near[0]}? (--help lists every flag)" if near else "--help lists every flag"
    return UserError(f"unknown flag {flag}: {hint}")


def _body(printed: str) -> str:
    """The first paragraph inside the box that tyro prints around an error."""
    body: list[str] = []
    for line in printed.splitlines()[1:]:
        text = line.strip().strip("│|").strip()
        if _RULE.fullmatch(text):
            break
        body.append(text)
    return " ".join(body) or " ".join(printed.split())


def _user_error(error: BaseException | None) -> UserError | None:
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def flag_value(name: str, argv: Sequence[str] | None = None, *, default: str, choices: Iterable[str] = ()) -> str:
    """The value that `argv` (None: the process's own) gives to `--name`, before the rest is parsed; the last counts.

    Raises: UserError where the flag has none; it lists `choices`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    value = default
    for index, argument in enumerate(argv):
        if argument == f"--{name}":
            if index + 1 == len(argv) or argv[index + 1].startswith("--"):
                hint = ", ".join(choices)
                raise UserError(f"--{name}: names no {name}: {f'choose one of {hint}' if hint else 'give one'}")
            value = argv[index + 1]
        elif argument.startswith(f"--{name}="):
            value = argument.split("=", 1)[1]
    return value


def parse(default: Config, argv: Sequence[str] | None = None, *, description: str | None = None) -> Config:
    """`default`, a dataclass instance, with the fields that `argv` (None: the process's own) sets by flags.

    `--help` prints every flag with its default and exits with 0.

    Raises: UserError, one line, for an unknown flag (with the nearest known one), a missing or wrong value, and
        whatever the dataclass itself refuses.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            config, unknown = tyro.cli(
                type(default),
                args=argv,
                default=default,
                description=description,
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        own = _user_error(stop)
        raise own or UserError(f"{_body(printed.getvalue()).rstrip('.')}: --help shows what it takes") from None
    if unknown:
        raise _unknown(unknown[0], default)
    return config


def parse_config(
    presets: Mapping[str, Config],
    argv: Sequence[str] | None = None,
    *,
    default: str | None = None,
    description: str | None = None,
) -> Config:
    """The configuration that `--preset NAME` names (else `default`, else the first), changed by all other flags.

    The configurations have a field `preset`.

    Raises: UserError, one line, for an unknown preset (listing those there are) and as `parse` does.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = default if default is not None else next(iter(presets))
    name = flag_value("preset", argv, default=first, choices=presets)
    if name not in presets:
        near = difflib.get_close_matches(name, presets, n=1)
        hint = f"did you mean {near[0]}? There are " if near else "choose one of "
        raise UserError(f"unknown preset {name!r}: {hint}{', '.join(presets)}")
    return parse(presets[name], argv, description=description)

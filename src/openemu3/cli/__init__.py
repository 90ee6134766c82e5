"""The command `emu3`: one dataclass per subcommand, whose fields are its flags and whose `run` does the work.

In: the command line. Out: files, or text on stdout; progress and errors on stderr. Exit code 0, 2 for bad input (one sentence, no
traceback), 130 for Ctrl-C. The surprising thing: rooms are imported inside `run`, so that `emu3 --help` does not wait for torch.

To add a subcommand: write a frozen dataclass with a docstring (its help) and a `run` method in a file of this folder, and name it in
`COMMANDS`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

import tyro

from openemu3 import __version__
from openemu3.cli.curate import Curate
from openemu3.cli.evaluate import Evaluate
from openemu3.cli.generate import Answer, Chat, Demo, Describe, Generate
from openemu3.cli.options import Command
from openemu3.cli.plan import Plan
from openemu3.cli.post_training import TokenizeConversations
from openemu3.cli.preferences import Preferences
from openemu3.cli.select import Select
from openemu3.cli.tokenize import Pack, Tokenize
from openemu3.cli.train import Export, Train
from openemu3.records import InputError

# --seed, not --drawing.seed; --json without --no-json; --height INT, not {None}|INT; PROMPT, not STR.
TYRO_MARKERS = (
    tyro.conf.OmitArgPrefixes,
    tyro.conf.OmitSubcommandPrefixes,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.DisallowNone,
    tyro.conf.PositionalMetavarFromFieldName,
)
BAD_INPUT = 2
INTERRUPTED = 130

COMMANDS: dict[str, Callable[..., Command]] = {
    "generate": Generate,
    "describe": Describe,
    "answer": Answer,
    "chat": Chat,
    "evaluate": Evaluate,
    "demo": Demo,
    "plan": Plan,
    "select": Select,
    "curate": Curate,
    "tokenize": Tokenize,
    "pack": Pack,
    "tokenize-conversations": TokenizeConversations,
    "train": Train,
    "export": Export,
    "preferences": Preferences,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code. `tyro` itself exits, with 0 after --help and 2 for flags that do not exist."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments == ["--version"]:
            print(f"emu3 {__version__}", flush=True)
            return 0
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="emu3",
            description="Draw, film, continue films and talk about pictures, with one transformer that predicts the next token.",
            args=arguments or ["--help"],
            config=TYRO_MARKERS,
        )
        command.run()
        sys.stdout.flush()
    except BrokenPipeError:  # `emu3 ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (InputError, OSError) as error:
        print("emu3: " + " ".join(str(error).split()), file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("emu3: stopped", file=sys.stderr)
        return INTERRUPTED
    return 0

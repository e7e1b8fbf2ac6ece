"""``python -m multipruner apply PLAN --model MODEL --output DIR``: a plan made into a model, without loading either."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from multipruner.core.errors import ConfigError

from .base import Parser, add_fields, log_flags, on_screen
from .recipe_flags import recipe_of

_HELP = """\
Cut a dense checkpoint as a plan says, tensor by tensor: the model is never loaded, so that a large one goes through on
a small machine. The result is a folder as a run writes it, in the dense model's own type.

PLAN   a plan.json, the folder of a run or of a sweep's plan, or a model on the Hub that multipruner pushed
       (owner/name, owner/name@revision), of which plan.json alone is downloaded
MODEL  the dense model: a recipe, a folder or a Hub id, as for pruning

A plan says which blocks, channels and heads stay. It holds no weights, so that what a run repaired after the cut is
not in it: the result is the cut model alone. `multipruner --plan PLAN` makes the repaired one, in memory.
The weights must be those that the plan was made of (it has their fingerprint); --any-weights takes others of the same
shapes, such as a fine-tuned model's.

Of a model of several modalities (docs/families.md says which) the text tower is pruned, and the whole is written:
everything else in it stays as it is, byte for byte, and transformers open it as they open the dense one. Where PLAN
is the folder of a run, the text tower is that of the run, with its repair. Layers must be alike (--layout uniform);
--text-only writes the cut text model alone, of any plan.

From a .gguf file to a .gguf file nothing is unpacked: tensors that stay whole, and rows of the others, keep their
stored numbers bit for bit. Columns that are no whole blocks of a quantised type are rounded anew, which is said.

examples
  python -m multipruner apply runs/llama-0.2 --model llama --output small
  python -m multipruner apply me/llama-small@v1 --model HuggingFaceTB/SmolLM2-135M --output small
  python -m multipruner apply runs/llama-0.2/plan.json --model ./my-finetune --any-weights --output small-finetune
  python -m multipruner apply runs/text --model google/gemma-3-4b-it --output whole
  python -m multipruner apply runs/llama-0.2 --model ./model-Q4_K_M.gguf --any-weights --output small.gguf"""


def make_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(
        prog="multipruner apply",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("plan", metavar="PLAN", help="a plan's file, a folder with one, or a Hub id")
    parser.add_argument("--model", metavar="NAME", required=True, help="the dense model: recipe, Hub id or folder")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", required=True, help="the folder to write, or of a .gguf file another one"
    )
    parser.add_argument("--any-weights", action="store_true", default=False,
                        help="do not compare the weights with those that the plan was made of")  # fmt: skip
    parser.add_argument("--text-only", action="store_true", default=False,
                        help="of a model of several modalities, write the cut text model alone")  # fmt: skip
    parser.add_argument("--no-reopen", dest="reopen", action="store_false", default=True,
                        help="do not open the result at the end, which takes memory for all of it (and is left out "
                        "where that is short)")  # fmt: skip
    add_fields(parser, lambda key: key in ("revision", "trust_remote_code"))
    parser.everyday.clear()  # there are few enough to show them all
    parser.add_argument("--overwrite", action="store_true", default=False, help="replace an earlier run's folder")
    log_flags(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def run(arguments: Sequence[str]) -> int:
    typed = vars(make_parser().parse_args(arguments))
    typed.pop("debug", None)
    plan, output = typed.pop("plan"), typed.pop("output")
    options = {name: typed.pop(name) for name in ("any_weights", "overwrite", "reopen", "text_only")}
    with on_screen(typed, "apply") as console:
        from multipruner.jobs.apply.from_gguf import cut_gguf
        from multipruner.jobs.apply.run import stream_plan
        from multipruner.jobs.prune.given_plan import NO_BUDGET
        from multipruner.storage.files import path_of

        recipe = recipe_of(typed, {**NO_BUDGET, "repair": "none"})
        command = shlex.join(["python", "-m", "multipruner", "apply", *arguments])
        if output.suffix == ".gguf" and (dense := path_of(recipe.model)).suffix == ".gguf":
            given = {"--text-only": options["text_only"], "--no-reopen": not options["reopen"],
                     "--revision": recipe.revision, "--trust-remote-code": recipe.trust_remote_code}  # fmt: skip
            if meant := [flag for flag, asked in given.items() if asked]:
                raise ConfigError(f"{', '.join(meant)}: a .gguf file has no such thing; leave it out")
            cut_gguf(plan, dense, output, console=console, any_weights=options["any_weights"],
                     overwrite=options["overwrite"])  # fmt: skip
        else:
            stream_plan(plan, recipe, output, console=console, command=command, **options)
    return 0

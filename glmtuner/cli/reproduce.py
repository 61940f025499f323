"""`reproduce RUN`: what is not as it was, the run again in another folder, and both compared step by step.

0: the same bytes, or the same but for rounding; 1: something else; 2: an error. With --check-only 1 is that something differs.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from glmtuner.distributed import ranks
from glmtuner.errors import ConfigError

HELP = "the run again elsewhere, and what is not as it was"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, metavar="DIR", help="the folder of the repetition (default: RUN_again)")
    parser.add_argument("--check-only", action="store_true", help="say what is not as it was, and run nothing")
    parser.add_argument(
        "--same-env", action="store_true", help="write the packages of then to RUN_requirements.txt, and run nothing"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the comparison as Markdown, too")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write it as a self-contained page, too")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from glmtuner.compare.document import show, write
    from glmtuner.compare.loaded import kind_of, load_run
    from glmtuner.compare.records import inside
    from glmtuner.compare.reproduce import check, repeat, require_free, require_run, verdict
    from glmtuner.compare.requirements import write_requirements

    path: Path = arguments.run
    if ranks.world_size() > 1:
        raise ConfigError(
            f"reproduce {path} was started as {ranks.world_size()} processes, and starts those of the run itself; type it without "
            "torchrun, accelerate or srun"
        )
    require_run(path, kind_of(path, "reproduce"))
    done = load_run(path.absolute(), path.name)
    if arguments.same_env:
        write_requirements(path, done.provenance)
        return 0
    output = (arguments.output or path.resolve().with_name(f"{path.resolve().name}_again")).expanduser().absolute()
    if not arguments.check_only:
        require_free(path, output)
    markdown, html = (file and file.absolute() for file in (arguments.markdown, arguments.html))
    with inside(done.cwd):
        checked = check(done, overrides)
        show(checked.document)
        if arguments.check_only:
            write(checked.document, markdown, html)
            return int(checked.document.differs)
        again = repeat(done, checked, output)
    document = verdict(done, again, checked)
    show(replace(document, sections=document.sections[-1:]))
    write(document, markdown, html)
    return int(document.sections[-1].is_difference)

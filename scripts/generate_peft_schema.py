"""Write glmtuner/assets/peft_fields.json from the configuration classes of the installed PEFT.

The file is committed so that `finetuning.config` is checked by name and type without importing torch. Run this after
raising the PEFT version; `tests/unit/finetuning/test_peft_fields.py` fails until it has been run.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

from glmtuner.finetuning.peft import REFUSED, config_class, peft_types
from glmtuner.finetuning.peft_fields import STORED, fields_of


def generate() -> str:
    """The file's text, a line for each method."""
    lines = []
    for name in sorted(peft_types() - REFUSED.keys()):
        fields = fields_of(config_class(name))
        about = {
            "class": fields.owner,
            "fields": {field: [kind, fields.defaults[field]] for field, kind in fields.kinds.items()},
        }
        lines.append(f'"{name}": {json.dumps(about)}')
    return f'{{"peft": "{version("peft")}", "methods": {{\n' + ",\n".join(lines) + "\n}}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=STORED, help="the file to write")
    target = parser.parse_args().output
    target.write_text(generate(), encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()

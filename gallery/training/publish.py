"""Stage 3 (CPU, seconds): copy a trained pipeline into the package, in the form that ships.

    python gallery/training/publish.py --pipeline build/pipeline/pipeline

Beside the copy: class names that older releases of transformers know too, no paths of the machine that trained, and a
look at the size.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parents[2] / "pipelines" / "visparse_pipelines" / "tiny_video"
LIMIT_MB = 40


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=2) + "\n")


def main() -> None:
    """Copy, edit, and refuse what is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=Path("build/pipeline/pipeline"))
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()
    shutil.copytree(args.pipeline, args.out, dirs_exist_ok=True)
    name = "PreTrainedTokenizerFast"
    edit(args.out / "model_index.json", lambda d: d.update(tokenizer=["transformers", name]))
    edit(args.out / "tokenizer" / "tokenizer_config.json", lambda d: d.update(tokenizer_class=name))
    edit(args.out / "vae" / "config.json", lambda d: d.pop("_name_or_path", None))
    size = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file()) / 1e6
    print(f"{args.out}: {size:.1f} MB")
    if size > LIMIT_MB:
        raise SystemExit(f"more than {LIMIT_MB} MB: too large for the wheel")


if __name__ == "__main__":
    main()

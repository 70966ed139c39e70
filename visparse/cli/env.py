"""`visparse env`: what is installed here and what can run; a block to paste into an issue."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("env", help="versions, devices, and which implementations can run")
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> int:
    """Print the environment."""
    facts = find_environment()
    print(json.dumps(facts, indent=2) if arguments.json else _as_text(facts))
    return 0


def find_environment() -> dict[str, Any]:
    """What is installed and what can run.

    Returns:
        `schema`, `platform`, `versions`, `commit`, `devices`; `attend`: per device which implementations run, and why.
    """
    import torch

    from visparse.measure.environment import describe_device, find_commit, find_versions

    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return {
        "schema": 1,
        "platform": platform.platform(),
        "versions": find_versions(),
        "commit": find_commit(),
        "devices": [describe_device(name) for name in names],
        "attend": {name: explain_attend(name) for name in ("cpu", "cuda:0") if name in names},
    }


def explain_attend(device: str) -> list[dict[str, Any]]:
    """Which implementations of `attend` take a usual call on a device: 4 heads of 64, 1,024 tokens.

    Args:
        device: torch name.

    Returns:
        One `{"impl", "runs", "reason"}` each, in the order in which `impl="auto"` tries them.
    """
    import torch

    from visparse_kernels import BlockLists, explain

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rows = torch.zeros(1, 1024, 4, 64, dtype=dtype, device=device)
    lists = BlockLists.dense(q_len=1024, k_len=1024, block_q=128, block_k=64, heads=4, device=device)
    return [{"impl": name, "runs": runs, "reason": reason} for name, runs, reason in explain(rows, lists)]


def _as_text(facts: dict[str, Any]) -> str:
    lines = ["```text", f"platform     {facts['platform']}"]
    lines += [f"{name:<12} {version or 'not installed'}" for name, version in facts["versions"].items()]
    lines.append(f"{'commit':<12} {facts['commit'] or 'not run from a git checkout'}")
    for device in facts["devices"]:
        rest = ", ".join(f"{name} {value}" for name, value in device.items() if name not in ("type", "name"))
        lines.append(f"{device['type']:<12} {device['name']}, {rest}")
    for device_name, candidates in facts["attend"].items():
        lines.append(f"attend on {device_name}")
        for one in candidates:
            lines.append(f"  {one['impl']:<10} {'can run' if one['runs'] else 'cannot run'}: {one['reason']}")
    return "\n".join([*lines, "```"])

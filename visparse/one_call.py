"""Models without denoising steps, such as vision transformers: each call stands alone, and so must plans."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from visparse.plan import SparsePlan


def for_one_call(plan: SparsePlan, model_class: str, *, free: bool) -> SparsePlan:
    """The plan for a model that has no steps.

    Args:
        plan: the plan.
        model_class: of the model, for the error text.
        free: whether its dense steps may be left out, as those of a preset.

    Returns:
        The plan, without dense steps.

    Raises:
        ValueError: the plan reuses something that is measured at a dense step, has dense steps of its own, or differs
            from step to step; the text says what to use instead.
    """
    none = f"{model_class} has no denoising steps"
    if plan.measures:
        raise ValueError(
            f"plan {plan.name!r} reuses what it measures at a dense step ({', '.join(plan.refreshes)}), and {none}; "
            "use 'neighborhood', or a plan that chooses tiles at each call: visparse.search(model, images=..., "
            "attention=0.5)"
        )
    if free and plan.dense_steps != 0:
        plan = plan.with_changes(dense_steps=0)
    if plan.needs_steps:
        what = f"dense_steps={plan.dense_steps}" if plan.dense_steps else "rules for some steps only"
        raise ValueError(f"plan {plan.name!r} has {what}, and {none}; use dense_steps=0 and rules for all steps")
    return plan

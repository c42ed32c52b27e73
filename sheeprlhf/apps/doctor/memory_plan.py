"""The memory that a training step would need, part by part, and what to change where it is too much."""

from collections.abc import Callable
from functools import cache, partial

from sheeprlhf.apps.doctor.machine_checks import Finding
from sheeprlhf.apps.terminal import table
from sheeprlhf.config.memory_advice import Change, memory_reductions, words
from sheeprlhf.config.registry import replace_options
from sheeprlhf.config.validate import parse_devices
from sheeprlhf.model.memory import NO_HOLES, MemoryPlan, ModelSize, measure
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.structure.task import DPOConfig, KTOConfig
from sheeprlhf.task.memory_plan import rows_of_forward, step_plan
from sheeprlhf.utils.memory import size_text

_TIGHT = 0.8  # of what is available: the plan is not that exact
_THRESHOLD = 1 << 20  # bytes; a smaller one costs more time


def memory_finding(config: TrainConfig, size: ModelSize, room: int | None, device: str) -> Finding:
    """The plan of a step beside the memory that there is.

    Args:
        config: what would be trained, and how.
        size: its model's.
        room: bytes that are available; None where nobody tells.
        device: "cuda", or "cpu", whose processes share one memory.
    """
    need = partial(step_plan, size_of=cache(measure), device=device)
    asked = parse_devices(config.fabric.devices)
    processes = asked if device == "cpu" and isinstance(asked, int) else 1
    parts = need(config)
    needed = processes * parts.total()
    text = f"a step of task={config.task.config_name} needs about {size_text(needed)} at its worst moment"
    details = _table(config, size, parts)
    details += [f"and that {processes} times, once in each process"] if processes > 1 else []
    if room is None:
        return Finding("ok", "memory", f"{text}; how much there is, is not known", tuple(details))
    text += f"; {size_text(room)} of {'GPU' if device == 'cuda' else 'main'} memory are available"
    if needed <= _TIGHT * room:
        return Finding("ok", "memory", text, tuple(details))
    details += _advice(config, _TIGHT * room / processes, lambda config: need(config).total())
    if parts.allocator:
        without = size_text(need(config, holes=False).total())
        details.append(f"{NO_HOLES}={_THRESHOLD} in the environment: {without}, slower")
    return Finding("problem" if needed > room else "warning", "memory", text, tuple(details))


def _table(config: TrainConfig, size: ModelSize, parts: MemoryPlan) -> list[str]:
    """One line a part, and their sum."""
    rows, row = rows_of_forward(config, size)
    recomputed = ", recomputed but for the inputs of layers" if config.model.gradient_checkpointing else ""
    kind = "pairs" if config.task.data_kind == "preference" else "rows"
    notes = {
        "weights": f"{size.parameters:,} parameters",
        "gradients": "of what trains",
        "optimizer": f"optim={config.optim.config_name}",
        "activations": f"{rows * row:,} tokens: {rows} {kind} of {row}{recomputed}",
        "logits": f"{size.vocabulary:,} numbers a target",
        "allocator": "what freed tensors leave unused in the heap",
        "libraries": "of the process, before there is a model",
        "others": "reference, critic and reward model, as far as the task has them",
    }
    lines = [(name, size_text(value), notes[name]) for name, value in parts._asdict().items() if value]
    if _has_reference(config):
        lines.append(("reference", "0 MB", "no second model: its log-probabilities are kept on the disk"))
    lines.append(("sum", size_text(parts.total()), ""))
    return ["  ".join(line).rstrip() for line in table(lines, right={1})]


def _has_reference(config: TrainConfig) -> bool:
    from sheeprlhf.task.train.dpo import NO_REFERENCE

    task = config.task
    if isinstance(task, KTOConfig):
        return True
    return isinstance(task, DPOConfig) and task.loss_type not in NO_REFERENCE and not task.reference_free


def _advice(config: TrainConfig, room: float, need: Callable[[TrainConfig], int]) -> list[str]:
    """Memory after each single change, and the changes that together fit into `room` bytes."""
    lines = ["what would be needed with", *_each(config, need)]
    together: Change = {}
    while need(config) > room and (changes := memory_reductions(config)):
        config, together = replace_options(config, changes[0]), together | changes[0]
    if need(config) > room:
        return [*lines, "all of them together are not enough: take a smaller model, or a machine with more memory"]
    return [*lines, f"{size_text(need(config))} would fit: {words(together)}"]


def _each(config: TrainConfig, need: Callable[[TrainConfig], int]) -> list[str]:
    cells = [(words(change), size_text(need(replace_options(config, change)))) for change in memory_reductions(config)]
    return ["  " + "  ".join(line) for line in table(cells, right={1})] if cells else []

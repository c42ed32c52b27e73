"""Mistakes in the engine that its tests notice."""

from tests.mutants.mutant import Mutant

_STEP = "sheeprlhf/engine/step.py"
_CHECKPOINT = "sheeprlhf/engine/checkpoint.py"
_UNIT = "tests/unit/engine"
_RANKS = "tests/distributed/test_update.py"

MUTANTS = [
    Mutant(
        trap="8",
        file=_STEP,
        old="        optimizer.step()\n    optimizer.zero_grad(set_to_none=True)\n",
        new="        optimizer.step()\n",
        tests=f"{_UNIT}/test_step.py::test_any_cut_is_one_batch",
    ),
    Mutant(
        trap="8",
        file=_STEP,
        old="            totals.append(output.total.detach())\n",
        new="            totals.append(output.total.detach())\n            optimizer.step() if index == 0 else None\n",
        tests=f"{_UNIT}/test_step.py::test_every_call_is_one_optimizer_step",
    ),
    Mutant(
        trap="9",
        file=_STEP,
        old="fabric.backward(output.total * (scale if counts else 0.0))",
        new="fabric.backward(output.total / micro.num_items / len(micro_batches))",
        tests=f"{_UNIT}/test_step.py::test_any_cut_is_one_batch",
    ),
    Mutant(
        trap="9",
        file=_STEP,
        old="scale = weight * fabric.world_size / num_items",
        new="scale = weight / num_items",
        tests=f"{_RANKS}::test_two_processes_equal_one",
    ),
    Mutant(
        trap="9",
        file=_STEP,
        old="    micro_batches = [m for m in micro_batches if m.num_items > 0]\n    items_of_rank",
        new="    items_of_rank",
        tests=f"{_UNIT}/test_step.py::test_a_micro_batch_without_items_cannot_spoil_the_step",
    ),
    Mutant(
        trap="10",
        file=_STEP,
        old="        with fabric.no_backward_sync(module, enabled=index + 1 < len(passes)):\n"
        '            with phase("forward pass"):\n'
        "                output = loss_fn(module, fabric.to_device(micro.batch))\n",
        new="        output = loss_fn(module, fabric.to_device(micro.batch))\n"
        "        with fabric.no_backward_sync(module, enabled=index + 1 < len(passes)):\n",
        tests=f"{_RANKS}::test_one_gradient_sync_per_step",
    ),
    Mutant(
        trap="12",
        file=_STEP,
        old="else value.double()",
        new="else value",
        tests=f"{_UNIT}/test_step.py::test_sums_are_kept_beyond_float32",
    ),
    Mutant(
        trap="18: every rank gets rank zero's generators",
        file=_CHECKPOINT,
        old='prefix = f"{fabric.global_rank}/"',
        new='prefix = "0/"',
        tests=f"{_UNIT}/test_resume.py::test_two_ranks_resume_bit_for_bit",
    ),
    Mutant(
        trap="non-finite steps are taken",
        file=_STEP,
        old='    if not (math.isfinite(result["loss"]) and math.isfinite(grad_norm_float)):\n',
        new="    if False:\n",
        tests=f"{_UNIT}/test_step.py::test_non_finite_loss_changes_nothing_and_names_the_rows",
    ),
    Mutant(
        trap="evaluation consumes random numbers",
        file=_STEP,
        old=", isolated_rng(), gathered(module)",
        new=", gathered(module)",
        tests=f"{_UNIT}/test_step.py::test_evaluation_leaves_generators_and_training_flags_alone",
    ),
    Mutant(
        trap="manifest check skipped",
        file="sheeprlhf/engine/manifest.py",
        old='        if _sha256(path) != expected["sha256"]:\n',
        new="        if False:\n",
        tests=f"{_UNIT}/test_checkpoint.py::test_every_flipped_bit_is_noticed",
    ),
    Mutant(
        trap="a repeated micro-batch counts",
        file=_STEP,
        old="(scale if counts else 0.0)",
        new="scale",
        tests="tests/distributed/test_uneven.py",
    ),
    Mutant(
        trap="a checkpoint of parts",
        file="sheeprlhf/engine/shard.py",
        old="on_device = tensor.to(target.device)\n",
        new="on_device = torch.zeros_like(tensor)\n",
        tests="tests/distributed/test_uneven.py",
    ),
    Mutant(
        trap="a checkpoint is not forced to the disk",
        file="sheeprlhf/utils/files.py",
        old="        os.fsync(descriptor)\n",
        new="        os.fstat(descriptor)\n",
        tests="tests/faults/test_crash_points.py",
    ),
    Mutant(
        trap="a rename is not forced to the disk before others are removed",
        file="sheeprlhf/engine/manifest.py",
        old="        fsync(target.parent)\n",
        new="",
        tests="tests/faults/test_crash_points.py",
    ),
    Mutant(
        trap="other data goes unnoticed",
        file="sheeprlhf/engine/rundir.py",
        old='    return bool(info["data_fingerprint"] == fingerprint)\n',
        new="    return True\n",
        tests="tests/faults/test_surroundings.py::test_other_data_is_refused_and_the_run_left_alone",
    ),
    Mutant(
        trap="generators not restored",
        file=_CHECKPOINT,
        old="        set_rng_state(rng)\n",
        new="        rng.clear()\n",
        tests=f"{_UNIT}/test_resume.py::test_resume_at_every_step",
    ),
    Mutant(
        trap="optimizer state not restored",
        file=_CHECKPOINT,
        old='    load_optimizer(path / "optimizer.safetensors", module, optimizer)\n',
        new="",
        tests=f"{_UNIT}/test_resume.py::test_resume_at_every_step",
    ),
    Mutant(
        trap="the best checkpoint is pruned",
        file=_CHECKPOINT,
        old="kept = {state.best_step, *",
        new="kept = {*",
        tests=f"{_UNIT}/test_checkpoint.py::test_newest_and_best_are_kept",
    ),
    Mutant(
        trap="20: secrets in the saved configuration",
        file="sheeprlhf/engine/run.py",
        old="redact(config_to_dict(cfg))",
        new="config_to_dict(cfg)",
        tests=f"{_UNIT}/test_run.py::test_a_whole_run",
    ),
    Mutant(
        trap="20: secrets not redacted",
        file="sheeprlhf/engine/redact.py",
        old="_SECRET_VALUE.sub(HIDDEN, text)",
        new="text",
        tests=f"{_UNIT}/test_redact.py::test_keys_are_hidden_wherever_they_are",
    ),
    Mutant(
        trap="out of memory is not recognised on the CPU",
        file="sheeprlhf/utils/memory.py",
        old="isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None",
        new="False",
        tests="tests/faults/test_memory.py::test_memory_runs_out",
    ),
    Mutant(
        trap="a run cannot go on in smaller portions",
        file="sheeprlhf/structure/registry.py",
        old="        *CUT_OPTIONS,\n",
        new="",
        tests="tests/faults/test_memory.py::test_the_run_goes_on_with_what_was_advised",
    ),
    Mutant(
        trap="metrics of a killed process stay",
        file="sheeprlhf/engine/metrics.py",
        old="if int(row[0]) <= last_step",
        new="if True",
        tests=f"{_UNIT}/test_metrics.py::test_each_tag_and_step_is_there_once_after_resumes",
    ),
    Mutant(
        trap="20: markup in samples is obeyed",
        file="sheeprlhf/engine/redact.py",
        old="html.escape(plain_text(text), quote=True)",
        new="plain_text(text)",
        tests=f"{_UNIT}/test_redact.py::test_markup_is_shown_and_not_obeyed",
    ),
]

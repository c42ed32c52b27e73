"""Mistakes in chat, demo and export that their tests notice."""

from tests.mutants.mutant import Mutant

_ASKING, _CHAT, _COMPARE, _EXPORT, _GUARD, _LORA, _STREAM, _TRAINED, _WRITER = (
    f"sheeprlhf/{name}.py"
    for name in (
        *("data/asking", "command/chat", "command/compare", "task/export"),
        *("command/demo_guard", "model/lora", "model/stream", "structure/trained", "task/writer"),
    )
)
_OF_STREAM = "tests/unit/model/test_stream.py::test_it_writes_what_generate_writes"
_OF_FORMS = "tests/unit/data/test_asking.py::test_each_form_writes_what_its_dataset_has"
_OF_GUARD = "tests/unit/command/test_demo_guard.py"
_OF_EXPORT = "tests/e2e/test_export.py::test_"
_OF_LORA = "tests/unit/model/test_lora.py::test_"
_OF_CHAT = "tests/e2e/test_chat.py::test_"

MUTANTS = [
    Mutant(
        trap="talk: settings of sampling are not those of generate",
        file=_STREAM,
        old="        warp.append(TemperatureLogitsWarper(cfg.temperature))\n",
        new="",
        tests=f"{_OF_STREAM}[cold-llama]",
    ),
    Mutant(
        trap="talk: settings of sampling are not those of generate",
        file=_STREAM,
        old="        if cfg.top_p < 1:\n",
        new="        if cfg.top_p > 1:\n",
        tests=f"{_OF_STREAM}[top-p-llama]",
    ),
    Mutant(
        trap="talk: a prompt is not written as in training",
        file=_ASKING,
        old='return {"prompt": f"{text.removesuffix(\':\')}:\\n{indent}{QUOTES}"}',
        new='return {"prompt": f"{text.removesuffix(\':\')}:\\n    {QUOTES}"}',
        tests="tests/unit/data/test_asking.py::test_a_signature_becomes_the_prompt_of_its_row",
    ),
    Mutant(
        trap="talk: a prompt is not written as in training",
        file=_ASKING,
        old='marks = {"user": HUMAN, "assistant": TURN}',
        new='marks = {"user": HUMAN, "assistant": HUMAN}',
        tests=_OF_FORMS,
    ),
    Mutant(
        trap="talk: the system message makes room for others",
        file=_WRITER,
        old='first = 1 if kept[0].role == "system" else 0\n',
        new="first = 0\n",
        tests=f"{_OF_CHAT}the_oldest_turns_make_room",
    ),
    Mutant(
        trap="talk: control characters reach the terminal",
        file=_CHAT,
        old="            safe = plain_text(text if begun < 0 else text[:begun]).lstrip()\n",
        new="            safe = (text if begun < 0 else text[:begun]).lstrip()\n",
        tests=f"{_OF_CHAT}nothing_that_a_terminal_obeys_is_printed",
    ),
    Mutant(
        trap="export: a wrong merge is written",
        file=_LORA,
        old="    check_difference(difference, after, share, what)\n",
        new="",
        tests=f"{_OF_EXPORT}a_wrong_merge_is_refused_with_figures",
    ),
    Mutant(
        trap="merge: an adapter on a tied head changes the embedding",
        file=_LORA,
        old="    check_difference(difference, after, share, what)\n",
        new="    check_difference(difference, after, 99.0, what)\n",
        tests=f"{_OF_LORA}adapters_on_a_tied_weight_made_elsewhere_are_not_merged",
    ),
    Mutant(
        trap="merge: an adapter on a tied head is trained",
        file=_LORA,
        old="    if shared:\n        names =",
        new="    if False:\n        names =",
        tests=f"{_OF_LORA}adapters_on_a_tied_weight_are_rejected",
    ),
    Mutant(
        trap="export: what was written is not looked at",
        file=_EXPORT,
        old="        check_difference(loaded, rounded, LOADED, ",
        new="        check_difference(0.0, rounded, LOADED, ",
        tests=f"{_OF_EXPORT}a_folder_that_was_written_wrong_is_not_left",
    ),
    Mutant(
        trap="export: the user's files are replaced",
        file=_EXPORT,
        old="        check_target(target)\n\n    size",
        new="    size",
        tests=f"{_OF_EXPORT}a_file_that_appears_meanwhile_is_kept",
    ),
    Mutant(
        trap="demo: files are served",
        file=_GUARD,
        old=' or ".." in path or "//" in path',
        new="",
        tests=_OF_GUARD,
    ),
    Mutant(
        trap="demo: another site's page may ask",
        file=_GUARD,
        old='        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):\n',
        new='        if origin == "null":\n',
        tests=_OF_GUARD,
    ),
    Mutant(
        trap="demo: a request has no limits",
        file=_COMPARE,
        old="            if not isinstance(value, int | float) or not least <= value <= most:\n",
        new="            if not isinstance(value, int | float) or not least <= value:\n",
        tests="tests/unit/command/test_compare.py::test_a_request_that_cannot_be_answered_says_why",
    ),
    Mutant(
        trap="talk: a run that starts from itself",
        file=_TRAINED,
        old="POLICY, starts - 1)",
        new="POLICY, starts)",
        tests="tests/unit/structure/test_trained.py::test_a_run_that_starts_from_itself_is_no_endless_search",
    ),
]

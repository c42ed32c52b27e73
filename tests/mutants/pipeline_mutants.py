"""Mistakes in pipelines that their tests notice."""

from tests.mutants.mutant import Mutant

_WORDS = "tests/unit/structure/test_pipeline.py::"
_RUN = "tests/unit/command/test_pipeline.py::"

MUTANTS = [
    Mutant(  # the recipe's word counts, not the command line's
        trap="pipeline",
        file="sheeprlhf/structure/pipeline.py",
        old='            by_key[word.partition("=")[0]] = word\n',
        new='            by_key.setdefault(word.partition("=")[0], word)\n',
        tests=f"{_WORDS}test_a_stage_has_its_words_and_those_of_the_command_line_each_option_once",
    ),
    Mutant(  # a stranger's recipe calls what it likes
        trap="pipeline",
        file="sheeprlhf/structure/strangers.py",
        old='    if re.split(r"[./@]", key)[0] == "hydra" or',
        new="    if",
        tests=f"{_WORDS}test_a_recipe_may_not_say_what_only_the_command_line_may",
    ),
    Mutant(  # an evaluation is not made again for the runs that it has not seen
        trap="pipeline",
        file="sheeprlhf/command/pipeline_state.py",
        old='    return record.get("status") == "finished" and record.get("command") == redact_command(command)\n',
        new='    return record.get("status") == "finished"\n',
        tests=f"{_RUN}test_stages_can_be_left_out_and_made_later",
    ),
    Mutant(  # the next stage begins after a signal
        trap="pipeline",
        file="sheeprlhf/command/child.py",
        old="            self.stopped_by = signum\n",
        new="            self.stopped_by = None\n",
        tests=f"{_RUN}test_a_stopped_stage_tells_the_command_and_its_signal",
    ),
    Mutant(  # figures of other weights and splits stand in the table
        trap="pipeline",
        file="sheeprlhf/command/pipeline_results.py",
        old='        if record.get("weights") == "final" and record.get("split") == "test":\n',
        new="        if record:\n",
        tests=f"{_RUN}test_the_table_is_what_the_evaluations_found",
    ),
    Mutant(  # a failed stage does not end it
        trap="pipeline",
        file="sheeprlhf/command/pipeline.py",
        old="        if code:\n            return code\n    return 0\n",
        new="    return 0\n",
        tests=f"{_RUN}test_a_failing_stage_ends_it_and_the_command_goes_on_there",
    ),
    Mutant(  # what stages start from is not checked
        trap="pipeline",
        file="sheeprlhf/command/pipeline.py",
        old='            if stage.verb == "train" and not problems:\n',
        new="            if False:\n",
        tests=f"{_RUN}test_a_chain_that_does_not_fit_is_refused",
    ),
]

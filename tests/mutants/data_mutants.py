"""Mutants of the data: each is a mistake that a framework shipped."""

from tests.mutants.mutant import Mutant

COLLATE, SAMPLER, TOKENIZE, PREPARE, READ = (
    f"sheeprlhf/data/{name}.py" for name in ("collate", "sampler", "tokenize", "prepare", "read")
)
TESTS = "tests/unit/data/test_"

MUTANTS = [
    Mutant(  # the mask is guessed from the pad id, which hides every EOS when both are one token
        trap="1",
        file=COLLATE,
        old="attention_mask=mask,",
        new="attention_mask=input_ids != pad_id,",
        tests=TESTS + "collate.py::test_pad_may_be_eos",
    ),
    Mutant(  # positions count the padding on the left
        trap="2",
        file=COLLATE,
        old="position_ids=np.where(mask, columns, 0),",
        new="position_ids=np.tile(np.arange(width), (len(rows), 1)),",
        tests=TESTS + "collate.py::test_padded_left_and_right",
    ),
    Mutant(  # a second response goes on from the first one's positions
        trap="2",
        file=COLLATE,
        old="positions.append(np.arange(num_prompt, num_prompt + len(response)))",
        new="positions.append(np.arange(len(response)) + response_start - start)",
        tests=TESTS + "collate.py::test_packed_two_responses_share_their_prompt",
    ),
    Mutant(  # BOS before a prompt whose template brought one
        trap="3",
        file=TOKENIZE,
        old="elif not (rendered and self._begins_with_bos(prompt)):",
        new="elif self.ids.bos:",
        tests=TESTS + "tokenize.py::test_one_bos_exactly_where_the_tokenizer_puts_one",
    ),
    Mutant(  # the last, smaller step of an epoch is lost
        trap="8",
        file=SAMPLER,
        old="return -(-self.num_rows // self.rows_per_step)",
        new="return max(self.num_rows // self.rows_per_step, 1)",
        tests=TESTS + "sampler.py::test_each_epoch_is_a_permutation_in_ceil_steps",
    ),
    Mutant(  # every rank trains on every row, so that rows count twice
        trap="9",
        file=SAMPLER,
        old="        if owner != rank:\n            continue\n",
        new="",
        tests=TESTS + "sampler.py::test_ranks_share_the_rows_of_a_step",
    ),
    Mutant(  # prompt and response tokenised together, then cut where the prompt's length says
        trap="13",
        file=TOKENIZE,
        old="        if not prompt and pieces.prompt:\n",
        new=(
            "        whole = encode(self.tokenizer, [pieces.prompt + text for text in pieces.responses])\n"
            "        prompt, responses = whole[0][: len(prompt)], [ids[len(prompt) :] for ids in whole]\n"
            "        if not prompt and pieces.prompt:\n"
        ),
        tests=TESTS + "tokenize.py::test_prompt_ids_are_always_a_prefix_that_both_responses_share",
    ),
    Mutant(  # the first token of a text is not learned
        trap="13",
        file=TOKENIZE,
        old="            prompt = self.ids.bos or [self.ids.eos]\n",
        new="            prompt, responses = responses[0][:1], [responses[0][1:]]\n",
        tests=TESTS + "texts.py::test_all_tokens_of_a_text_are_learned",
    ),
    Mutant(  # every epoch replays the first one's order
        trap="18",
        file=SAMPLER,
        old="np.random.default_rng([seed, epoch])",
        new="np.random.default_rng(seed)",
        tests=TESTS + "sampler.py::test_epochs_and_seeds_differ_and_repeat",
    ),
    Mutant(  # "removed duplicates" are counted and kept
        trap="20",
        file=PREPARE,
        old="dropped = DUPLICATE if duplicate and cfg.remove_same_inputs else row.dropped",
        new="dropped = row.dropped",
        tests=TESTS + "prepare.py::test_every_row_is_kept_or_counted",
    ),
    Mutant(  # remove_same_responses is never read
        trap="20",
        file=TOKENIZE,
        old="return self.cfg.remove_same_responses and len(set(responses)) < len(responses)",
        new="return False",
        tests=TESTS + "prepare.py::test_every_row_is_kept_or_counted",
    ),
    Mutant(  # prompt and response are capped each, their sum is not
        trap="20",
        file=TOKENIZE,
        old="if len(prompt) <= cfg.max_prompt_length and len(prompt) + longest <= cfg.max_length:",
        new="if len(prompt) <= cfg.max_prompt_length and longest <= cfg.max_length:",
        tests=TESTS + "tokenize.py::test_overflow_keeps_bos_and_the_prompts_end",
    ),
    Mutant(  # a folder that we did not make is deleted
        trap="20",
        file="sheeprlhf/utils/folders.py",
        old="        if has_marker(folder):\n",
        new="        if folder.is_dir():\n",
        tests=TESTS + "prepare.py::test_a_kill_at_any_step_leaves_no_torn_cache",
    ),
    Mutant(  # an edited format_row goes on with the rows that it made before
        trap="a user's own rows",
        file=PREPARE,
        old="""[cfg.row_format, inspect.getsource(import_module(cfg.row_format.partition(":")[0]))]""",
        new="cfg.row_format",
        tests=TESTS + "prepare.py::test_rows_are_made_anew_when_the_code_of_their_format_changes",
    ),
    Mutant(  # a dataset's own columns never reach its format
        trap="a user's own rows",
        file="sheeprlhf/data/layout.py",
        old="self._more = (*cfg.read_columns, *more)",
        new="self._more = cfg.read_columns",
        tests=TESTS + "read.py::test_a_dataset_may_read_columns_of_its_own",
    ),
    Mutant(  # a context that no task reads is lost in silence
        trap="a user's own rows",
        file="sheeprlhf/data/layout.py",
        old="name = next((name for name in unread if name in MEANING_COLUMNS), None)",
        new="name = None",
        tests=TESTS + "layout.py::test_the_advice_is_followed_to_the_letter",
    ),
    Mutant(  # a conversation that asks again is a prompt up to its last answer
        trap="prompts",
        file="sheeprlhf/data/conversation.py",
        old="    if as_prompt and _asks(messages):\n",
        new="    if as_prompt and _asks(messages) and not any(map(is_answer, messages)):\n",
        tests=TESTS + "prompts.py::test_a_conversation_that_ends_with_the_user_is_the_prompt",
    ),
    Mutant(  # an answer that the row marks as bad is learned
        trap="answers marked as bad",
        file="sheeprlhf/data/conversation.py",
        old="    trained = [index for index in answers if is_trained(messages[index]) is not False]\n",
        new="    trained = answers\n",
        tests=TESTS + "conversation.py::test_a_message_marked_bad_is_never_a_target",
    ),
    Mutant(  # tools are lost in silence where a template does not read them
        trap="parts of a conversation that are lost",
        file="sheeprlhf/data/conversation.py",
        old='        if self._tools and "tools" not in known:\n',
        new="        if False:\n",
        tests=TESTS + "conversation.py::test_what_changes_the_meaning_and_cannot_be_read_is_refused",
    ),
    Mutant(  # an answer of a prompt that is given is learned
        trap="answers marked as bad",
        file="sheeprlhf/data/conversation.py",
        old="    first, last = len(example.context) - example.own_turns, len(example.context)\n",
        new="    first, last = 0, len(example.context)\n",
        tests=TESTS + "conversation.py::test_answers_in_a_given_prompt_are_never_learned",
    ),
    Mutant(  # other tasks would learn from rows without a response
        trap="prompts",
        file=TOKENIZE,
        old='if kind == "prompts" and cfg.prompt_format else',
        new="if cfg.prompt_format else",
        tests=TESTS + "prompts.py::test_what_is_refused",
    ),
    Mutant(  # the place of a response that is not there counts as a token less
        trap="prompts",
        file="sheeprlhf/task/batches.py",
        old=".max(axis=1, initial=0)",
        new=".max(axis=1, initial=-1)",
        tests="tests/unit/task/test_batches.py::test_of_ranked_responses_the_longest_sequence_counts_not_their_sum",
    ),
    Mutant(  # a damaged cache passes for a whole one
        trap="cache",
        file="sheeprlhf/data/store.py",
        old="if _digest(folder / name) != known",
        new="if not (folder / name).exists()",
        tests=TESTS + "prepare.py::test_a_damaged_cache_is_prepared_again",
    ),
    Mutant(  # the response is encoded as a text of its own, with a space that nobody wrote
        trap="prefix space",
        file="sheeprlhf/data/encoding.py",
        old="self._in_context = writes_prefix_space(tokenizer)",
        new="self._in_context = False",
        tests=TESTS + "encoding.py::test_a_response_has_the_ids_behind_its_prompt",
    ),
    Mutant(  # a long response pushes its prompt out
        trap="truncation",
        file=TOKENIZE,
        old="room = max(min(cfg.max_prompt_length, cfg.max_length), bos, 1)",
        new="room = max(min(cfg.max_prompt_length, cfg.max_length - longest), bos, 1)",
        tests=TESTS + "tokenize.py::test_overflow_keeps_bos_and_the_prompts_end",
    ),
]

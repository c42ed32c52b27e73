"""Imperative and third-person summaries: which one a sentence is.

PEP 257 asks for a function's summary in the imperative ("Return the value."), "not as a description" ("Returns the
value."). The rules here look at the first word only and know a closed list of verbs, so that a plural noun ("Settings",
"Tests", "Options") is never taken for a verb. The list was collected by counting the first words of 140,000 summaries
of permissively licensed packages: a verb is in it when both of its forms begin summaries there.

A verb that is also a common noun or adjective ("set", "list", "filter", "complete") counts only before a determiner:
"Set the value." is imperative, "Set of values." is neither. Stative verbs that describe a class rather than tell a
function what to do ("represents", "contains", "holds", "describes", "indicates") are left out.
"""

import re
from typing import Literal

Style = Literal["imperative", "third_person", "other"]

_VERBS = """
    accept accumulate acquire activate adapt add adjust align allocate allow analyze annotate append apply ask assemble
    assert assign attach attempt augment authenticate avoid await begin bind build calculate cancel
    canonicalize capture catch check choose classify coerce collapse collect combine compare compile compose compress
    compute concatenate configure confirm connect constrain construct consume continue convert create customize decide
    declare decode decompose decompress decorate decrease decrement decrypt defer define delete derive deserialize
    destroy detach detect determine disable discard disconnect discover dispatch distribute divide do draw embed emit
    enable encapsulate encode encrypt enforce enqueue ensure enter enumerate erase establish evaluate evict exclude
    execute expand expose extend extract fetch fill finalize find flatten flush forget freeze gather generate get give
    handle hide identify ignore implement include increase increment indent infer inform initialise initialize inject
    insert inspect install instantiate instruct integrate intercept interpolate interpret invalidate invert invoke
    iterate join keep kill launch learn listen load locate look maintain make manage mark marshall materialize merge
    migrate minimize modify move multiply notify obtain optimize overwrite parse pause perform permute persist pick pop
    populate predict prepare prepend preprocess prevent print produce promote propagate provide prune publish purge put
    quantize raise read rebuild receive recompute reconstruct recover recreate refine refresh register reject reload
    remove rename render reorder replace resample rescale reserve reshape resize resolve restart restore restrict resume
    retrieve return revert rewrite rotate sanitize save select send serialize serve show shuffle shut simplify simulate
    skip solve specify squeeze standardize strip submit subscribe subtract summarize swap synchronize synthesize take
    tell terminate throw toggle tokenize translate traverse trim truncate try turn undo unify unload unpack unregister
    unset unsubscribe unwrap validate verify visit visualize wait wake walk warn wrap write yield
"""
VERBS: frozenset[str] = frozenset(_VERBS.split())

_NOUN_LIKE_VERBS = """
    abort access advance aggregate approximate associate average benchmark block broadcast cache call cast cause center
    change clear clip clone close commit complete control copy count crop cycle delegate display download drain dump
    echo end escape estimate exit export fail filter fire fit fix flag flip fold force form format forward free fuse
    group guess hash have help highlight import index issue label limit link list lock log loop lower map mask
    match measure mirror monitor mount open order output override pack pad partition pass patch place play plot poll
    post process profile prompt pull push query quote record redirect reduce release repeat report request reset
    reverse roll round route run sample scale scan schedule score search seed separate set shift sign slice snapshot
    sort split stack start step stop store substitute supply support switch tag trace track train transform transpose
    trigger update upload use view watch
"""
NOUN_LIKE_VERBS: frozenset[str] = frozenset(_NOUN_LIKE_VERBS.split())

_DETERMINERS = """
    a all an another any both each every if it its multiple no one out self some the their them these this those
    two up us whether your
"""
DETERMINERS: frozenset[str] = frozenset(_DETERMINERS.split())

_SPECIAL = {"have": "has"}
_NOUN_FOLLOWERS = frozenset({"are", "is", "of", "was", "were"})
_NOUN_PAIRS = frozenset(
    {("return", word) for word in ("address", "annotation", "annotations", "code", "status", "type", "types", "value")}
    | {("return", "values"), ("find", "results"), ("read", "access"), ("load", "balancer"), ("load", "average")}
)
FIRST_WORD = re.compile(r"([A-Za-z][a-z]*)(?=[ .]|\Z)")


def third_person(verb: str) -> str:
    """Return the third-person form of a base verb by rule: ``pass`` to ``passes``, ``try`` to ``tries``."""
    if verb in _SPECIAL:
        return _SPECIAL[verb]
    if verb.endswith(("s", "x", "z", "ch", "sh", "o")):
        return f"{verb}es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return f"{verb[:-1]}ies"
    return f"{verb}s"


THIRD_OF = {verb: third_person(verb) for verb in sorted(VERBS | NOUN_LIKE_VERBS)}
BASE_OF = {third: verb for verb, third in THIRD_OF.items()}


def style_of(sentence: str) -> Style:
    """Say if a sentence begins with an imperative verb, a third-person verb or something else (`other`)."""
    return first_verb(sentence)[0]


def first_verb(sentence: str) -> tuple[Style, str]:
    """Return the style of a sentence, and the base form of its verb."""
    match = FIRST_WORD.match(sentence)
    if match is None:
        return "other", ""
    first = match.group(1).lower()
    verb = first if first in THIRD_OF else BASE_OF.get(first)
    if verb is None:
        return "other", ""
    after = sentence[match.end() :].split(maxsplit=1)
    follower = after[0].lower().strip(".,;:") if after else ""
    if follower in _NOUN_FOLLOWERS or (verb, follower) in _NOUN_PAIRS:
        return "other", ""
    if verb in NOUN_LIKE_VERBS and follower not in DETERMINERS:
        return "other", ""
    return ("imperative" if first == verb else "third_person"), verb

"""Turns about residents: open, yes-no and inverse questions, follow-ups and comparisons."""

import random

from demo_models.text import tales
from demo_models.text.phrasings import ATTRIBUTES, Attribute, Mention, ask, capital, tell
from demo_models.text.talk import ABSENT
from demo_models.text.turns import Memory, Turn, pronounceable, some_name, some_resident
from demo_models.text.world import RESIDENTS, Resident

_FOLLOW_UPS = (
    "And {s}?",
    "What about {s}?",
    "And what about {s}?",
    "How about {s}?",
    "And for {s}?",
)
_ABOUT = (
    "Who is {s}?",
    "Tell me about {o}.",
    "Describe {o}.",
    "What do you know about {o}?",
    "Introduce {o}.",
    "Can you tell me about {o}?",
    "Do you know {o}?",
    "Tell me more about {o}.",
)
_THREE_FACTS = (
    "Tell me three facts about {o}.",
    "List three facts about {o}.",
    "Give me three facts about {o}.",
    "Name three things about {o}.",
)
_ALL_FACTS = (
    "List everything you know about {o}.",
    "Tell me everything about {o}.",
    "List all facts about {o}.",
    "What are all the facts about {o}?",
)
_AGES = (
    "Who is {older}, {a} or {b}?",
    "Which one is {older}, {a} or {b}?",
    "Is {a} or {b} {older}?",
    "Is {a} {older} than {b}?",
    "Is {a} {older} than {b}?",
)
_NEIGHBOURS = (
    "Do {a} and {b} live in the same part of town?",
    "Are {a} and {b} neighbours?",
    "Do {a} and {b} live near each other?",
)
_FRIENDS = (
    "Are {a} and {b} friends?",
    "Do {a} and {b} play together?",
    "Are {a} and {b} best friends?",
)


def _short(attribute: Attribute, who: Resident) -> str:
    return capital(f"{attribute.value(who).split()[-1]}.")


def _focus(attribute: Attribute, who: Resident) -> tuple[Resident, ...]:
    return pronounceable(who, who.friend) if attribute.name == "friend" else (who,)


def open_question(memory: Memory, rng: random.Random) -> Turn:
    """An open question for one fact."""
    attribute = rng.choice(ATTRIBUTES)
    who, mention = some_resident(memory, rng)
    if attribute.name == "species" and who.species in mention.subject:
        mention = Mention.named(who.name)
    template = rng.choice(attribute.asks)
    return Turn(
        ask(template, "", mention),
        tell(attribute, who),
        _short(attribute, who),
        who.emoji,
        f"{template}|{who.name}",
        _focus(attribute, who),
        attribute,
    )


def yes_no_question(memory: Memory, rng: random.Random) -> Turn:
    """A question whether a fact is true; the answer states the fact."""
    attribute = rng.choice(ATTRIBUTES)
    who, mention = some_resident(memory, rng)
    if attribute.name == "species" and who.species in mention.subject:
        mention = Mention.named(who.name)
    value = attribute.value(who if rng.random() < 0.5 else rng.choice(RESIDENTS))
    if value == who.name or (attribute.name in ABSENT and rng.random() < 0.1):
        value = rng.choice(ABSENT[attribute.name])
    template = rng.choice(attribute.checks)
    verdict = _verdict(value == attribute.value(who))
    return Turn(
        ask(template, value, mention),
        f"{verdict}, {tell(attribute, who)}",
        f"{verdict}.",
        who.emoji,
        f"{template}|{who.name}|{value}",
        _focus(attribute, who),
        attribute,
    )


def inverse_question(memory: Memory, rng: random.Random) -> Turn:
    """A question for the resident of whom a fact is true."""
    attribute = rng.choice([attribute for attribute in ATTRIBUTES if attribute.inverse])
    who = rng.choice(RESIDENTS)
    template = rng.choice(attribute.inverse)
    return Turn(
        ask(template, attribute.value(who), Mention.named("")),
        tell(attribute, who),
        f"{who.name}.",
        who.emoji,
        f"{template}|{who.name}",
        (who,),
        attribute,
    )


def follow_up(memory: Memory, rng: random.Random) -> Turn | None:
    """The last question of fact repeated for another resident: "And Bruno?"."""
    attribute = memory.last.attribute
    if not attribute:
        return None
    who = rng.choice(RESIDENTS)
    return Turn(
        ask(rng.choice(_FOLLOW_UPS), "", Mention.named(some_name(who, rng))),
        tell(attribute, who),
        _short(attribute, who),
        who.emoji,
        f"and|{attribute.name}|{who.name}",
        _focus(attribute, who),
        attribute,
    )


def description(memory: Memory, rng: random.Random) -> Turn:
    """A request for an introduction, for three facts or for all facts."""
    who, mention = some_resident(memory, rng)
    asks, answer = rng.choice(
        (
            (_ABOUT, tales.summary(who)),
            (_ABOUT, tales.summary(who)),
            (_THREE_FACTS, tales.bullets(tales.facts(who)[:3])),
            (_ALL_FACTS, tales.bullets(tales.facts(who))),
        )
    )
    template = rng.choice(asks)
    return Turn(
        ask(template, "", mention),
        answer,
        capital(f"{who.species}."),
        who.emoji,
        f"{template}|{who.name}",
        (who,),
    )


def comparison(memory: Memory, rng: random.Random) -> Turn:
    """A question about two residents: their ages, homes or friendship.

    The answers state the facts before the conclusion, which helps a small model.
    """
    a, b = rng.sample(RESIDENTS, 2)
    if rng.random() < 0.3:
        b = a.friend
    compare = rng.choice((_ages, _ages, _areas, _friendship))
    template, answer, short = compare(a, b, rng)
    question = template.format(a=some_name(a, rng), b=some_name(b, rng))
    key = f"{template}|{a.name}|{b.name}"
    return Turn(capital(question), answer, f"{short}.", "🤝", key, pronounceable(a, b))


def _ages(a: Resident, b: Resident, rng: random.Random) -> tuple[str, str, str]:
    adjective, pick = rng.choice((("older", max), ("younger", min)))
    chosen = pick(a, b, key=lambda who: who.age)
    template = rng.choice(_AGES).replace("{older}", adjective)
    short = chosen.name if " or " in template else _verdict(chosen is a)
    facts = f"{a.name} is {a.age} years old and {b.name} is {b.age}"
    return template, f"{facts}, so {chosen.name} is {adjective}.", short


def _areas(a: Resident, b: Resident, rng: random.Random) -> tuple[str, str, str]:
    here, there = a.home.area, b.home.area
    answer = f"{a.name} lives {here.where} and {b.name} lives {there.where}, so they are "
    answer += "neighbours." if here is there else "not neighbours."
    return rng.choice(_NEIGHBOURS), answer, _verdict(here is there)


def _friendship(a: Resident, b: Resident, rng: random.Random) -> tuple[str, str, str]:
    answer = f"No, {a.name}'s best friend is {a.friend.name}."
    if a.friend is b:
        answer = f"Yes, {a.name} and {b.name} are best friends."
    return rng.choice(_FRIENDS), answer, _verdict(a.friend is b)


def _verdict(is_true: bool) -> str:
    return "Yes" if is_true else "No"

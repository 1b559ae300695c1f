"""Questions for the facts of Porto Lume and their answers: one `Attribute` per kind of fact.

Questions have the slots {s} (subject), {p} (possessive) and {o} (object), which take a name or a
pronoun, and {v} for a value. Small talk and questions about the town are plain tables.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from demo_models.text.world import Resident, with_article


@dataclass(frozen=True)
class Attribute:
    """One kind of fact about residents.

    `value` returns it for a resident; `answer` states it with {n} and {v}; `asks` are open
    questions, `checks` yes-no questions about a value, `inverse` questions for the resident with a
    value. Without `inverse`, a value may belong to several residents.
    """

    name: str
    value: Callable[[Resident], str]
    answer: str
    asks: tuple[str, ...]
    checks: tuple[str, ...]
    inverse: tuple[str, ...] = ()


ATTRIBUTES = (
    Attribute(
        "species",
        lambda who: who.species,
        "{n} is {a}.",
        (
            "What kind of animal is {s}?",
            "What animal is {s}?",
            "Which animal is {s}?",
            "What species is {s}?",
            "What is {s}?",
        ),
        ("Is {s} {a}?", "Is {s} the {v}?"),
        (
            "Which resident is {a}?",
            "What is the {v} called?",
            "What is the name of the {v}?",
            "Is there {a} in Porto Lume?",
            "Who is {a}?",
        ),
    ),
    Attribute(
        "home",
        lambda who: who.home.name,
        "{n} lives in the {v}.",
        (
            "Where does {s} live?",
            "Where is {p} home?",
            "What is {p} home?",
            "Where can I find {o}?",
            "Tell me where {s} lives.",
            "Do you know where {s} lives?",
            "In which building does {s} live?",
            "Which place is {p} home?",
            "Where does {s} sleep?",
            "Where is {s}?",
        ),
        ("Does {s} live in the {v}?", "Is the {v} {p} home?", "Can I find {o} in the {v}?"),
        (
            "Who lives in the {v}?",
            "Whose home is the {v}?",
            "Which resident lives in the {v}?",
            "Who can I meet in the {v}?",
            "Which animal lives in the {v}?",
            "Does anyone live in the {v}?",
        ),
    ),
    Attribute(
        "job",
        lambda who: who.job,
        "{n} works as {a}.",
        (
            "What is {p} job?",
            "What does {s} do for a living?",
            "What work does {s} do?",
            "What is {p} profession?",
            "What does {s} work as?",
            "Tell me what {s} does for work.",
            "How does {s} earn a living?",
            "What job does {s} have?",
            "What does {s} do?",
        ),
        ("Does {s} work as {a}?", "Is {s} the {v}?", "Is {p} job {v}?"),
        (
            "Who is the {v}?",
            "Who works as {a}?",
            "Which resident is {a}?",
            "Who is {a}?",
            "Is there {a} in Porto Lume?",
            "Which animal works as {a}?",
        ),
    ),
    Attribute(
        "food",
        lambda who: who.food,
        "{n} loves to eat {v}.",
        (
            "What does {s} eat?",
            "What does {s} like to eat?",
            "What is {p} favourite food?",
            "Which food does {s} love?",
            "What should I cook for {o}?",
            "What does {s} have for breakfast?",
            "Tell me {p} favourite food.",
            "What food does {s} like best?",
        ),
        ("Does {s} like to eat {v}?", "Does {s} eat {v}?", "Is {p} favourite food {v}?"),
        (
            "Who likes to eat {v}?",
            "Who eats {v}?",
            "Who loves {v}?",
            "Whose favourite food is {v}?",
            "Which resident eats {v}?",
        ),
    ),
    Attribute(
        "colour",
        lambda who: who.colour,
        "{p} favourite colour is {v}.",
        (
            "What is {p} favourite colour?",
            "Which colour does {s} like best?",
            "What colour does {s} like?",
            "Tell me {p} favourite colour.",
            "What colour is {p} scarf?",
            "Do you know {p} favourite colour?",
        ),
        ("Is {p} favourite colour {v}?", "Does {s} like the colour {v}?"),
        (
            "Whose favourite colour is {v}?",
            "Who likes the colour {v}?",
            "Which resident likes {v} best?",
            "Who wears a scarf that is {v}?",
        ),
    ),
    Attribute(
        "hobby",
        lambda who: who.hobby,
        "{n} loves {v}.",
        (
            "What is {p} hobby?",
            "What does {s} do for fun?",
            "What does {s} like to do?",
            "What does {s} do after work?",
            "How does {s} spend the evening?",
            "What does {s} love to do?",
            "Does {s} have a hobby?",
        ),
        ("Does {s} like {v}?", "Is {p} hobby {v}?", "Does {s} love {v}?"),
        (
            "Who likes {v}?",
            "Whose hobby is {v}?",
            "Who enjoys {v}?",
            "Which resident loves {v}?",
        ),
    ),
    Attribute(
        "age",
        lambda who: str(who.age),
        "{n} is {v} years old.",
        (
            "How old is {s}?",
            "What is {p} age?",
            "Tell me {p} age.",
            "How many years old is {s}?",
            "Do you know how old {s} is?",
        ),
        ("Is {s} {v} years old?", "Is {p} age {v}?"),
        ("Who is {v} years old?", "Which resident is {v} years old?", "Who is {v}?"),
    ),
    Attribute(
        "sound",
        lambda who: who.sound,
        '{n} says "{v}".',
        (
            "What sound does {s} make?",
            "What does {s} say?",
            "Which noise does {s} make?",
            "How does {s} sound?",
            "Tell me the sound {s} makes.",
        ),
        ('Does {s} say "{v}"?', "Does {s} say {v}?", "Does {s} make the sound {v}?"),
        (
            'Who says "{v}"?',
            "Who says {v}?",
            "Which animal says {v}?",
            "Who makes the sound {v}?",
        ),
    ),
    Attribute(
        "friend",
        lambda who: who.friend.name,
        "{p} best friend is {v}.",
        (
            "Who is {p} best friend?",
            "Who is {p} friend?",
            "Who does {s} play with?",
            "What is the name of {p} best friend?",
            "Who does {s} like best?",
            "Which friend does {s} have?",
            "Does {s} have a friend?",
        ),
        ("Is {v} {p} friend?", "Is {v} {p} best friend?", "Does {s} play with {v}?"),
    ),
    Attribute(
        "area",
        lambda who: who.home.area.where,
        "{n} lives {v}.",
        (
            "In which part of town does {s} live?",
            "Which part of town does {s} live in?",
            "Which area does {s} live in?",
            "What part of Porto Lume is {p} home in?",
        ),
        ("Does {s} live {v}?", "Is {p} home {v}?"),
    ),
)


class Mention(NamedTuple):
    """The forms in which a question may mention a resident."""

    subject: str
    possessive: str
    object: str

    @classmethod
    def named(cls, name: str) -> "Mention":
        """A mention by any name, such as "Fenna" or "the fox"."""
        return cls(name, f"{name}'s", name)

    @classmethod
    def pronoun(cls, who: Resident) -> "Mention":
        """A mention by she or he."""
        return cls(who.subject, who.possessive, who.object)


IT = Mention("it", "its", "it")


def tell(attribute: Attribute, who: Resident, mention: Mention | None = None) -> str:
    """A resident's value as a sentence."""
    value = attribute.value(who)
    subject, whose, _ = mention or Mention.named(who.name)
    return capital(attribute.answer.format(n=subject, p=whose, v=value, a=with_article(value)))


def ask(template: str, value: str, mention: Mention) -> str:
    """A question template with its slots filled."""
    slots = dict(zip("spo", mention, strict=True))
    return capital(template.format(**slots, v=value, a=with_article(value)))


def capital(sentence: str) -> str:
    """The sentence with its first letter in upper case."""
    return sentence[:1].upper() + sentence[1:]

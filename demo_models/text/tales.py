"""The longer texts of Porto Lume: stories, poems, portraits, lists and routes.

Each text is a fixed function of its subjects, so that one prompt has one right answer.
"""

from demo_models.text.phrasings import ATTRIBUTES, Mention, tell
from demo_models.text.world import AREAS, PLACES, RESIDENTS, Place, Resident, joined, with_article

OPENING = "Once upon a time in Porto Lume,"


def short_story(hero: Resident, helper: Resident) -> str:
    """One paragraph in which `helper` comes to the aid of `hero`."""
    return (
        f"{OPENING} {hero.full_name} lived in the {hero.home.name}. One morning {hero.trouble},"
        f" and {hero.name} did not know what to do. Then {helper.full_name} came by with a basket"
        f' of {helper.food}. "Do not worry, {hero.name}," said {helper.name}, "we will do it'
        f' together." So they {hero.rescue}. That evening they shared {hero.food} and'
        f" {helper.food} by the sea, and all of Porto Lume was happy."
        f" The end. {hero.emoji}{helper.emoji}"
    )


def long_story(hero: Resident, helper: Resident) -> str:
    """The story of `short_story` in five paragraphs."""
    she = hero.subject
    return (
        f"{OPENING} {hero.full_name} lived in the {hero.home.name}. {she.title()} was {hero.age}"
        f" years old and worked as {with_article(hero.job)}. Everyone knew {hero.object}, because"
        f" {she} loved {hero.hobby} and always wore {with_article(hero.colour)} scarf.\n\n"
        f"One morning {hero.trouble}, and {hero.name} did not know what to do. {she.title()} ate a"
        f' plate of {hero.food}, but it did not help. "{hero.sound.title()}!" said {hero.name}'
        f" sadly, and {she} set out to find a friend.\n\n"
        f"{she.title()} walked all the way to the {helper.home.name}, where {helper.full_name} was"
        f' busy {helper.hobby}. "Do not worry, {hero.name}," said {helper.name}, "we will do it'
        f' together."\n\n'
        f"So they {hero.rescue}. It took the whole afternoon, and they laughed a lot.\n\n"
        f"That evening they shared {hero.food} and {helper.food} by the sea. The lamps of Porto"
        f" Lume were lit one by one, and the two friends fell asleep under the stars."
        f" The end. {hero.emoji}{helper.emoji}"
    )


def poem(hero: Resident) -> str:
    """Four rhyming lines."""
    return (
        f"In the {hero.home.name} beside the sea 🌊\n"
        f"{hero.full_name} hums merrily.\n"
        f"With {hero.food} to share and {hero.friend.name} near,\n"
        f"the song of Porto Lume is clear. 🎵"
    )


def summary(hero: Resident) -> str:
    """Two sentences that introduce a resident."""
    return (
        f"{hero.name} is {with_article(hero.species)} {hero.emoji} who lives in the"
        f" {hero.home.name}. {hero.subject.title()} works as {with_article(hero.job)} and loves"
        f" to eat {hero.food}."
    )


def facts(who: Resident) -> list[str]:
    """All facts about a resident, one sentence each."""
    return [tell(attribute, who) for attribute in ATTRIBUTES]


def portrait(who: Resident) -> str:
    """All facts about a resident as one paragraph, with pronouns from the second sentence on."""
    rest = [tell(attribute, who, Mention.pronoun(who)) for attribute in ATTRIBUTES[1:]]
    return " ".join([tell(ATTRIBUTES[0], who), *rest])


def place_portrait(place: Place) -> str:
    """All facts about a place as one paragraph."""
    owner = next(resident for resident in RESIDENTS if resident.home is place)
    return (
        f"The {place.name} is {place.area.where}. {owner.full_name} lives there."
        f" At the {place.name} you can {place.offer}. {place.emoji}"
    )


def route(start: Place, goal: Place) -> str:
    """The way between two places, through the areas in between."""
    first, last = AREAS.index(start.area), AREAS.index(goal.area)
    step = 1 if first <= last else -1
    way = [AREAS[i].name for i in range(first, last + step, step)]
    stops = " → ".join(f"the {stop}" for stop in [start.name, *way, goal.name])
    return f"Take this way: {stops}."


def bullets(items: list[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {item}" for item in items)


def all_residents() -> str:
    """The residents as one sentence."""
    return f"The residents are {joined([resident.name for resident in RESIDENTS])}."


def directory() -> str:
    """A list of who lives where."""
    return bullets([f"{who.full_name} {who.emoji} → {who.home.name}" for who in RESIDENTS])


def all_places() -> str:
    """A list of the places by area."""
    return bullets(
        [
            f"The {area.name}: {joined([place.name for place in PLACES if place.area is area])}"
            for area in AREAS
        ]
    )

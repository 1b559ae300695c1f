"""Turns about everything else: stories, places, lists, small talk, the user, unknown topics."""

import random

from demo_models.text import tales, talk
from demo_models.text.phrasings import ask, capital
from demo_models.text.turns import Memory, Turn, pronounceable, some_name, some_resident
from demo_models.text.world import AREAS, PLACES, RESIDENTS, Resident, joined

_STORY = (
    "Tell me a {l}story{t}.",
    "Can you tell me a {l}story{t}?",
    "Tell a {l}story{t}.",
    "Write a {l}story{t}.",
    "I want to hear a {l}story{t}.",
    "A {l}story{t}, please.",
    "Please tell me a {l}story{t}.",
    "I would like a {l}story{t}.",
)
_ANOTHER = ("Another one!", "Tell me another story.", "One more, please.", "Another story, please.")
_YES = ("Yes", "Yes please", "Yes, please.", "OK", "Sure", "Yes!", "Of course", "Please do.")
_POEM = ("Write a poem about {o}.", "Tell me a poem about {o}.", "Sing a song about {o}.")
_ROUTE = (
    "How do I get from the {a} to the {b}?",
    "What is the way from the {a} to the {b}?",
    "How can I walk from the {a} to the {b}?",
    "Show me the route from the {a} to the {b}.",
)
_PLACE_WHERE = (
    "Where is the {v}?",
    "Where can I find the {v}?",
    "In which part of town is the {v}?",
    "Tell me where the {v} is.",
)
_PLACE_OFFER = (
    "What can I do at the {v}?",
    "What is there to do at the {v}?",
    "Why should I visit the {v}?",
    "What can I do in the {v}?",
)
_PLACE_ABOUT = ("Tell me about the {v}.", "What is the {v}?", "Describe the {v}.")
_LISTS = (
    (
        ("Who lives in Porto Lume?", "List all residents.", "Name the residents.",
         "Which animals live in Porto Lume?", "Who are the residents?", "Who lives here?",
         "List the animals.", "What are the names of the residents?"),
        tales.all_residents(),
    ),
    (
        ("List all residents with their homes.", "Who lives where?", "Where does everyone live?",
         "Make a list of the residents and their homes.", "List all homes.", "List the homes."),
        tales.directory(),
    ),
    (
        ("List all places.", "Which places are there?", "What places can I visit?",
         "What can I visit in Porto Lume?", "Which places are in Porto Lume?", "List the places.",
         "What is there to see?"),
        tales.all_places(),
    ),
)  # fmt: skip
_NAME = (
    "My name is {v}.",
    "I am {v}.",
    "Call me {v}.",
    "I'm {v}",
    "Hi, I am {v}!",
    "Hello, my name is {v}.",
)
_NAME_ASKS = ("What is my name?", "Do you remember my name?", "Who am I?", "Do you know my name?")
_ECHO = ("Say:", "Repeat:", "Repeat after me:", "Please repeat:", "Say", "Echo:")
_LIKES = {
    "colour": ("red", "blue", "green", "black", "violet", "grey", "lilac", "yellow"),
    "food": ("pizza", "rice", "soup", "chocolate", "bread", "pasta", "apples", "cheese"),
    "animal": tuple(f"the {creature}" for creature in talk.CREATURES),
    "number": tuple(str(number) for number in range(2, 100)),
}


def story(memory: Memory, rng: random.Random) -> Turn | None:
    """A request for a story: about one resident, two, anyone, or another story."""
    last = memory.last
    if last.answer == talk.NO_STORY and rng.random() < 0.7:
        return _story_turn(rng.choice(_YES), RESIDENTS[0])
    if last.hero and rng.random() < 0.3:
        following = RESIDENTS[(RESIDENTS.index(last.hero) + 1) % len(RESIDENTS)]
        return _story_turn(rng.choice(_ANOTHER), following)
    template, length = (
        rng.choice(_STORY),
        rng.choices(("", "short ", "long ", "very long "), (5, 2, 2, 1))[0],
    )
    if rng.random() < 0.15:
        return _story_turn(template.format(l=length, t=""), RESIDENTS[0])
    hero, mention = some_resident(memory, rng)
    topic, helper = f" about {mention.object}", hero.friend
    if rng.random() < 0.35:
        helper = rng.choice([other for other in RESIDENTS if other is not hero])
        topic += f" and {some_name(helper, rng)}"
    return _story_turn(template.format(l=length, t=topic), hero, helper)


def _story_turn(question: str, hero: Resident, helper: Resident | None = None) -> Turn:
    helper = helper or hero.friend
    tell = tales.long_story if "long " in question else tales.short_story
    focus, key = pronounceable(hero, helper), f"{tell.__name__}|{hero.name}|{helper.name}"
    key = "" if helper is hero.friend else key
    return Turn(question, tell(hero, helper), "Adventure.", "📖", key, focus, hero=hero)


def poem(memory: Memory, rng: random.Random) -> Turn:
    """A request for a poem."""
    who, mention = some_resident(memory, rng)
    question = ask(rng.choice(_POEM), "", mention)
    return Turn(question, tales.poem(who), "Poetry.", "🎵", focus=(who,))


def place(memory: Memory, rng: random.Random) -> Turn:
    """A question about a place."""
    spot = rng.choice(PLACES)
    here = capital(f"{spot.area.where.split()[-1]}.")
    asks, answer, short = rng.choice(
        (
            (_PLACE_WHERE, f"The {spot.name} is {spot.area.where}.", here),
            (_PLACE_OFFER, f"At the {spot.name} you can {spot.offer}.", f"{spot.thing}."),
            (_PLACE_ABOUT, tales.place_portrait(spot), f"{spot.thing}."),
            (
                (f"Where can I {spot.offer}?",),
                f"You can {spot.offer} at the {spot.name}.",
                capital(f"{spot.name}."),
            ),
        )
    )
    template = rng.choice(asks)
    question = template.format(v=spot.name)
    return Turn(question, answer, short, spot.emoji, f"{template}|{spot.name}")


def route(memory: Memory, rng: random.Random) -> Turn:
    """A question for the way between two places."""
    start, goal = rng.sample(PLACES, 2)
    template = rng.choice(_ROUTE)
    key = f"{template}|{start.name}|{goal.name}"
    question = template.format(a=start.name, b=goal.name)
    return Turn(question, tales.route(start, goal), "Walk.", "🧭", key)


def listing(memory: Memory, rng: random.Random) -> Turn:
    """A request for a list of residents or places."""
    if rng.random() < 0.4:
        asks, answer = rng.choice(_LISTS)
        return Turn(rng.choice(asks), answer, "Many.", "📋")
    area = rng.choice(AREAS)
    spots = [spot for spot in PLACES if spot.area is area]
    names = joined([who.name for spot in spots for who in RESIDENTS if who.home is spot])
    template, answer = rng.choice(
        (
            ("Who lives {w}?", f"{names} live"),
            ("Which residents live {w}?", f"{names} live"),
            ("Which places are {w}?", f"The {joined([spot.name for spot in spots])} are"),
            ("What is {w}?", f"The {joined([spot.name for spot in spots])} are"),
        )
    )
    return Turn(template.format(w=area.where), f"{answer} {area.where}.", "Three.", "📋")


def small_talk(memory: Memory, rng: random.Random) -> Turn:
    """Greetings, thanks and the like."""
    saying = rng.choice(talk.SMALL_TALK)
    question = rng.choice(saying.asks)
    if question in _YES and memory.last.answer == talk.NO_STORY:
        return _story_turn(question, RESIDENTS[0])
    return Turn(question, saying.answer, saying.short, saying.emoji, aside=True)


def town(memory: Memory, rng: random.Random) -> Turn:
    """A question about the town as a whole."""
    saying = rng.choice(talk.TOWN)
    return Turn(rng.choice(saying.asks), saying.answer, saying.short, saying.emoji)


def outside(memory: Memory, rng: random.Random) -> Turn:
    """A question that the model must decline."""
    if rng.random() < 0.2:
        who, mention = some_resident(memory, rng)
        question = ask(rng.choice(talk.UNKNOWN_FACTS), "", mention)
        answer = f"I do not know that about {who.name}."
        return Turn(question, answer, "Unknown.", "🤷", focus=(who,))
    if rng.random() < 0.15:
        topic = f" about {talk.stranger(rng)}"
        question = rng.choice(_STORY).format(l=rng.choice(("", "short ", "long ")), t=topic)
        return Turn(question, talk.NO_STORY, "Unknown.", "🤷")
    question = talk.stranger_question(rng) if rng.random() < 0.35 else talk.outside_question(rng)
    return Turn(question, talk.OUTSIDE, "Unknown.", "🤷")


def echo(memory: Memory, rng: random.Random) -> Turn:
    """A request to repeat some words, which trains the copying that names need."""
    words = " ".join(talk.word_to_repeat(rng) for _ in range(rng.randint(1, 6)))
    question = f"{rng.choice(_ECHO)} {words}"
    return Turn(question, words, words.split()[0], "🦜", aside=True, literal=True)


def user_name(memory: Memory, rng: random.Random) -> Turn:
    """The user states their name, or asks for it."""
    known = memory.notes.get("name")
    if rng.random() < (0.8 if known else 0.25):
        answer = f"Your name is {known}." if known else "You have not told me your name yet."
        short = f"{known}." if known else "Unknown."
        return Turn(rng.choice(_NAME_ASKS), answer, short, "😊", aside=True)
    name = talk.person_name(rng)
    name = name.lower() if rng.random() < 0.15 else name
    return Turn(
        rng.choice(_NAME).format(v=name),
        f"Nice to meet you, {name}!",
        "Hello!",
        "👋",
        note=("name", name),
        aside=True,
        literal=True,
    )


def user_taste(memory: Memory, rng: random.Random) -> Turn:
    """The user states a favourite thing, or asks for it."""
    category = rng.choice(list(_LIKES))
    known = memory.notes.get(category)
    if rng.random() < (0.8 if known else 0.25):
        answer = f"You have not told me your favourite {category} yet."
        short = f"{known}." if known else "Unknown."
        answer = f"Your favourite {category} is {known}." if known else answer
        return Turn(f"What is my favourite {category}?", answer, short, "😊", aside=True)
    thing = rng.choice(_LIKES[category]) if rng.random() < 0.6 else talk.invented_word(rng)
    return Turn(
        f"My favourite {category} is {thing}.",
        f"I will remember that your favourite {category} is {thing}.",
        "Noted.",
        "📝",
        note=(category, thing),
        aside=True,
        literal=True,
    )

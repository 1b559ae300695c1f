"""Porto Lume: its residents, places and facts. Every sentence of the corpus derives from here.

Other modules decide how these facts are asked for and expressed.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Area:
    """A part of the town; `where` is the phrase that places something in it."""

    name: str
    where: str


@dataclass(frozen=True)
class Place:
    """A building. `offer` completes "there you can ..."; `thing` is its one-word form."""

    name: str
    emoji: str
    area: Area
    offer: str
    thing: str


@dataclass(frozen=True)
class Resident:
    """A resident. `trouble` and `rescue` are the two halves of the story about them."""

    name: str
    species: str
    emoji: str
    female: bool
    home: Place
    job: str
    food: str
    colour: str
    sound: str
    hobby: str
    age: int
    trouble: str
    rescue: str

    @property
    def subject(self) -> str:
        """The subject pronoun, she or he."""
        return "she" if self.female else "he"

    @property
    def object(self) -> str:
        """The object pronoun, her or him."""
        return "her" if self.female else "him"

    @property
    def possessive(self) -> str:
        """The possessive pronoun, her or his."""
        return "her" if self.female else "his"

    @property
    def full_name(self) -> str:
        """The name with the species, as in "Fenna the fox"."""
        return f"{self.name} the {self.species}"

    @property
    def friend(self) -> "Resident":
        """The best friend; friendship is mutual and always between a she and a he."""
        return _FRIENDS[self.name]


# The order is the way through town: routes walk along it from one area to the next.
AREAS = (
    Area("hill", "on the hill"),
    Area("river", "by the river"),
    Area("market square", "on the market square"),
    Area("harbour", "at the harbour"),
)
_HILL, _RIVER, _MARKET, _HARBOUR = AREAS

PLACES = (
    Place("lighthouse", "🗼", _HARBOUR, "watch the ships come home", "Ships"),
    Place("bakery", "🥖", _MARKET, "buy warm bread", "Bread"),
    Place("boathouse", "🛶", _HARBOUR, "take the ferry across the bay", "Ferry"),
    Place("library", "📚", _HILL, "borrow a good book", "Books"),
    Place("posthouse", "📮", _MARKET, "send a letter to a friend", "Letters"),
    Place("tower", "🔔", _HILL, "hear the bells ring at noon", "Bells"),
    Place("café", "☕", _MARKET, "drink hot chocolate", "Chocolate"),
    Place("windmill", "🌾", _HILL, "see how flour is made", "Flour"),
    Place("greenhouse", "🌷", _RIVER, "smell a hundred flowers", "Flowers"),
    Place("shipyard", "⛵", _HARBOUR, "see how boats are built", "Boats"),
    Place("workshop", "🧵", _RIVER, "have a coat mended", "Coats"),
    Place("theatre", "🎭", _RIVER, "listen to music every evening", "Music"),
)
_AT = {place.name: place for place in PLACES}

# fmt: off
RESIDENTS = (
    Resident("Fenna", "fox", "🦊", True, _AT["lighthouse"], "lamplighter", "crêpes", "red", "yip",
             "stargazing", 7, "the great lamp of the lighthouse would not shine",
             "polished the lamp until it shone like a little sun"),
    Resident("Bruno", "bear", "🐻", False, _AT["bakery"], "baker", "pretzels", "yellow", "grr",
             "singing", 12, "the oven of the bakery had gone cold",
             "carried dry wood up from the beach and lit a merry fire"),
    Resident("Otto", "otter", "🦦", False, _AT["boathouse"], "captain", "sardines", "blue", "chirp",
             "swimming", 5, "the ferry had lost its brass bell",
             "searched the beach until the bell glittered in the sand"),
    Resident("Olga", "owl", "🦉", True, _AT["library"], "librarian", "almonds", "purple", "hoo",
             "reading", 40, "the oldest book in the library was missing",
             "looked under every shelf and found the book behind the clock"),
    Resident("Pip", "penguin", "🐧", True, _AT["posthouse"], "courier", "herring", "white", "honk",
             "skating", 6, "one letter in the mailbag had no address",
             "knocked at every door until the letter was home"),
    Resident("Tilda", "turtle", "🐢", True, _AT["tower"], "clockmaker", "lettuce", "gold", "hmm",
             "napping", 99, "the clock in the tower had stopped",
             "oiled every wheel until the clock began to tick again"),
    Resident("Luna", "cat", "🐱", True, _AT["café"], "cook", "tuna", "pink", "meow",
             "climbing", 9, "there was no chocolate left in the café",
             "borrowed a sack of cocoa from a passing ship"),
    Resident("Milo", "mouse", "🐭", False, _AT["windmill"], "miller", "cheese", "orange", "squeak",
             "painting", 3, "the wind had dropped and the windmill stood still",
             "whistled a long, loud tune until the wind came back"),
    Resident("Zoé", "frog", "🐸", True, _AT["greenhouse"], "gardener", "strawberries", "green",
             "ribbit", "juggling", 4, "the roses in the greenhouse had lost their colour",
             "watered the roses with rain from the hill until they glowed again"),
    Resident("Björn", "seal", "🦭", False, _AT["shipyard"], "shipbuilder", "mussels", "silver",
             "arf", "sailing", 21, "the new boat in the shipyard had a hole",
             "closed the hole with a strong plank of oak"),
    Resident("Hugo", "hedgehog", "🦔", False, _AT["workshop"], "tailor", "apples", "brown", "sniff",
             "knitting", 8, "the biggest coat in the workshop had no buttons",
             "made twelve fine buttons out of seashells"),
    Resident("João", "rabbit", "🐰", False, _AT["theatre"], "musician", "carrots", "turquoise",
             "thump", "dancing", 10, "nobody could find the drum for the evening concert",
             "built a new drum from a barrel and an old sail"),
)
# fmt: on
_BY_NAME = {resident.name: resident for resident in RESIDENTS}
_PAIRS = (
    ("Fenna", "Bruno"),
    ("Pip", "Otto"),
    ("Olga", "Milo"),
    ("Luna", "Björn"),
    ("Tilda", "Hugo"),
    ("Zoé", "João"),
)
_FRIENDS = {a: _BY_NAME[b] for pair in _PAIRS for a, b in (pair, pair[::-1])}


def with_article(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun.startswith(tuple('aeiou')) else 'a'} {noun}"


def joined(items: list[str]) -> str:
    """An English enumeration: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))

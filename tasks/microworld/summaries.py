"""News with what matters in it, in other words: a few highlights, or one sentence."""

from typing import NamedTuple

from m2l.typing import JsonObject

from .dice import Dice
from .world import RELATIONS, SLOTS, TOWNS, a_or_an


class _Event(NamedTuple):
    """Something in the news: three points, each told in two ways and, shorter, as a highlight.

    The first point comes first; {thing} is one of `things`, {near} lies near {town}.
    """

    points: tuple[tuple[str, str, str], tuple[str, str, str], tuple[str, str, str]]
    summaries: tuple[str, str]
    things: tuple[str, ...] = ()


_EVENTS = (
    _Event(
        (
            (
                "the team of {town} beat {town2} in the final of the cup.",
                "in the final of the cup the players of {town} won against {town2}.",
                "{town2} loses the cup to {town}.",
            ),
            (
                "the last goal of the match was by {full}.",
                "it was {full} who made the last goal of the match.",
                "{full} scores.",
            ),
            (
                "the streets of {town} were full of fans until late at night.",
                "the fans of {town} were in the streets all night.",
                "happy people do not sleep.",
            ),
        ),
        (
            "a goal by {full} has won the cup for {town}.",
            "{town2} has lost the final to {town} after a goal by {full}.",
        ),
    ),
    _Event(
        (
            (
                "a {thing} came out of the forest and ran to the market of {town}.",
                "people at the market of {town} were afraid of a {thing}.",
                "a {thing} visits the market in {town}.",
            ),
            (
                "a {job} called {full} took the {thing} away with a big net.",
                "{full}, a {job}, put a net over the {thing} and took it away.",
                "the {job} {full} gets the animal.",
            ),
            (
                "the {thing} will live on a farm near {town2}.",
                "a farm near {town2} will keep the {thing} from now on.",
                "it has a new home near {town2}.",
            ),
        ),
        (
            "with a net {full} got a {thing} out of the market of {town}.",
            "a {thing} from the market of {town} will have a new home near {town2}.",
        ),
        ("bear", "fox", "goat", "sheep", "horse"),
    ),
    _Event(
        (
            (
                "a firm in {town} that sells {goods} made more money than last year.",
                "last year was a good one for a firm in {town} that makes {goods}.",
                "a firm from {town} makes a high profit with {goods}.",
            ),
            (
                "the owner, {full}, wants to open one more shop in {town2}.",
                "{town2} will have a shop of the firm too, says the owner, {full}.",
                "{full} plans a new shop in {town2}.",
            ),
            (
                "from spring the workers will have more money every week.",
                "the firm will give its workers more money from spring.",
                "its workers get more.",
            ),
        ),
        (
            "a firm in {town} has sold a lot of {goods} and plans a shop in {town2}.",
            "{full} will sell {goods} from {town} in {town2} too.",
        ),
    ),
    _Event(
        (
            (
                "scientists in {town} have a robot that can {thing}.",
                "scientists in {town} built a robot, and it can {thing}.",
                "a new robot from {town} can {thing}.",
            ),
            (
                "{full} worked on the software for two years.",
                "for two years {full} wrote the software of the robot.",
                "its software is by {full}.",
            ),
            (
                "people in {town2} can buy the robot from next winter.",
                "next winter the robot will be in the shops of {town2}.",
                "{town2} will sell it.",
            ),
        ),
        (
            "scientists in {town} have made a robot to {thing}.",
            "next winter {town2} will sell a robot from {town} that can {thing}.",
        ),
        ("write songs", "paint walls", "play chess", "open doors", "carry bags", "read books"),
    ),
    _Event(
        (
            (
                "the people of {town} want {full} to be the next mayor.",
                "{full} won the vote and is now the mayor of {town}.",
                "{town} has a new mayor, {full}.",
            ),
            (
                "the mayor wants to build a {thing} by the {near}.",
                "the first work of the mayor will be a {thing} by the {near}.",
                "a {thing} will be built.",
            ),
            (
                "few people were for {full2}, a {job}.",
                "not many people wanted {full2}, who is a {job}.",
                "the {job} {full2} loses.",
            ),
        ),
        (
            "{full}, the new mayor of {town}, plans a {thing}.",
            "{town} will get a {thing} from its new mayor.",
        ),
        ("school", "library", "hospital", "bridge", "theatre", "station"),
    ),
    _Event(
        (
            (
                "a storm took the roof off the {thing} of {town}.",
                "the {thing} of {town} has no roof after a strong storm in the night.",
                "the {thing} in {town} loses its roof in a storm.",
            ),
            (
                "{full} has a farm and gave everybody a bed there.",
                "everybody could sleep on the farm of {full}.",
                "{full} helps people who need a bed.",
            ),
            (
                "a {job} from {town2} fixes the roof and does not want money.",
                "a {job} who came from {town2} will fix the roof for no money.",
                "a {job} from {town2} helps for free.",
            ),
        ),
        (
            "the {thing} of {town} has lost the roof in a storm.",
            "a {job} from {town2} will help {town} after a storm.",
        ),
        ("school", "library", "hospital", "church", "theatre", "station"),
    ),
    _Event(
        (
            (
                "{full} walked from {town} to {town2} with a {animal}.",
                "a {animal} and {full} went the long way from {town} to {town2}.",
                "{full} goes to {town2} with a {animal}.",
            ),
            (
                "people on the way gave money for the {thing}.",
                "at every house on the road people gave money to help the {thing}.",
                "the {thing} gets money.",
            ),
            (
                "next year {full} wants to walk with a {job}.",
                "{full} will go again next year, and a {job} will come too.",
                "a {job} will walk there too.",
            ),
        ),
        (
            "{full} has walked to {town2} to help the {thing}.",
            "the {thing} gets money after {full} walked to {town2} with a {animal}.",
        ),
        ("school", "library", "hospital", "church", "theatre"),
    ),
    _Event(
        (
            (
                "last night somebody took a {colour} {thing} out of a shop in {town}.",
                "a shop in {town} lost a {colour} {thing} to somebody who came at night.",
                "somebody takes a {colour} {thing} from a shop in {town}.",
            ),
            (
                "{full}, a {job}, saw the {thing} in a river near {town2}.",
                "the {thing} was in a river near {town2}, where {full}, a {job}, saw it.",
                "the {job} {full} finds it near {town2}.",
            ),
            (
                "the owner of the shop was happy and gave {full} a {food}.",
                "the owner thanked {full} with a {food}.",
                "the owner gives a {food} for it.",
            ),
        ),
        (
            "a {job} has found a {thing} from a shop in {town} in a river.",
            "the {colour} {thing} of a shop in {town} was in a river near {town2}.",
        ),
        ("boat", "piano", "bike", "coat", "lamp", "box"),
    ),
    _Event(
        (
            (
                "the singer {full} was on a stage in {town} for the first time in ten years.",
                "{town} had to wait ten years, but last night the singer {full} was on stage.",
                "{full} sings again in {town}.",
            ),
            (
                "everybody stayed to the end and loved the {thing}.",
                "the {thing} were so good that nobody went home.",
                "people enjoy the {thing}.",
            ),
            (
                "a record will be in the shops of {town2} in spring.",
                "in spring a record will come out in {town2}.",
                "{town2} will sell the record.",
            ),
        ),
        (
            "people in {town} had to wait ten years for the singer {full}.",
            "after {full} played {thing} in {town}, a record will come out.",
        ),
        ("slow songs", "soft songs", "new songs", "old songs", "fast songs", "long songs"),
    ),
    _Event(
        (
            (
                "{full} of {town} won first prize for a book about a {animal}.",
                "first prize goes to {full} of {town} for the story of a {animal}.",
                "a book about a {animal} wins a prize for {full}.",
            ),
            (
                "{full} wrote the book in a small house by the {near}.",
                "the book was the work of a year in a small house by the {near}.",
                "it is from a quiet place by the {near}.",
            ),
            (
                "in {thing} people in {town2} can see a film of the book.",
                "a film of the book will be in {town2} in {thing}.",
                "there will be a movie in {thing}.",
            ),
        ),
        (
            "{full} from {town} wins a prize for a story of a {animal}.",
            "a book by {full}, which won a prize, will be a film in {thing}.",
        ),
        ("spring", "winter"),
    ),
)
# What is said beside the point.
_ASIDES = (
    "a {job2} at the station wants to know more about it.",
    "nobody told me about it, says a {job2} in the street.",
    "the paper of {town2} has more about it on the next page.",
    "the pictures in the paper are by {name}.",
    "everybody in {town} has read about it by now.",
    "{name2} was in {town2} that day and saw nothing of it.",
)


def _told(dice: Dice, asides: int) -> tuple[_Event, list[str], dict[str, str]]:
    """Draws an event, the sentences of its article, and what the slots of both are filled with."""
    event, town = dice.pick(_EVENTS), dice.pick(tuple(TOWNS.values()))
    words = {"town": town.name, "near": town.near}
    words["thing"] = dice.pick(event.things) if event.things else ""
    slots = {**SLOTS, "food": ("cake", "pie", "cheese")}
    for slot in ("full", "town", "job", "name"):
        words.setdefault(slot, dice.pick(slots[slot]))
        words[f"{slot}2"] = dice.other(slots[slot], words[slot])
    for slot in ("goods", "animal", "colour", "food"):
        words[slot] = dice.other(slots[slot], words["thing"])
    said = [dice.pick(point[:2]) for point in event.points]
    facts = [
        RELATIONS[relation].state(dice.below(4), name, RELATIONS[relation].facts[name])
        for relation in ("region", "goods", "near")
        for name in (words["town"], words["town2"])
    ]
    beside = [*dice.sample(_ASIDES, asides - 1), dice.pick(facts)]
    for aside in dice.shuffled(beside):
        said.insert(1 + dice.below(len(said)), aside)
    return event, [a_or_an(sentence.format(**words)) for sentence in said], words


def cnn_dailymail(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Writes an article of three points and three asides, and the points in other words."""
    event, said, words = _told(dice, 3)
    return {
        "article": " ".join(said),
        "highlights": "\n".join(a_or_an(point[2].format(**words)) for point in event.points),
        "id": "",
    }


def xsum(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Writes three points and two asides, and one sentence that joins what matters."""
    event, said, words = _told(dice, 2)
    return {
        "document": " ".join(said),
        "summary": a_or_an(dice.pick(event.summaries).format(**words)),
        "id": "",
    }

"""Words with two senses, and which of two sentences use one in the same sense."""

import re
from typing import NamedTuple

from m2l.typing import JsonObject

from .dice import Dice
from .world import fill


class Sense(NamedTuple):
    """What a word means, and sentences that use it so: the [word], (one/of/these), a {slot}."""

    meaning: str
    sentences: tuple[str, ...]


def _senses(table: str) -> dict[str, tuple[Sense, Sense]]:
    senses = {}
    for block in table.strip().split("\n\n"):
        word, *lines = (line.strip() for line in block.splitlines())
        second = next(i for i, line in enumerate(lines) if i and line.startswith("= "))
        senses[word] = tuple(
            Sense(part[0].removeprefix("= "), tuple(part[1:]))
            for part in (lines[:second], lines[second:])
        )
    return senses


SENSES = _senses("""
bank
= a place for money
{name} put the money in the [bank].
the [bank] in {town} has a lot of money.
the {job} got money from the [bank].
the [bank] of {town} closed at (two/three/ten).
the owner of the [bank] buys a firm in {town}.
= the side of a river
{name} sat on the [bank] and washed the clothes in the river.
the {animal} slept on the [bank] by the water.
the grass on the [bank] of the river is (wet/long/green).
{name} sat in a boat and saw a {animal} on the [bank].
the {job} left the boat on the [bank].

match
= a game
{town} won the last [match] of the season.
{name} saw the (tennis/football/chess) [match] in {town}.
the players were (tired/hungry/proud) after the [match].
the coach praised {name} after the [match].
the fans of {town} stayed to the end of the [match].
= a small stick for making fire
{name} lights the wood with a [match].
{name} found a box of [matches] in the (kitchen/shop/workshop).
the [match] of {name} was wet and gave no fire.
{name} dropped the hot [match] on the (floor/grass/stone/road).
the {job} lights the lamp with the last [match].

letter
= a paper that you write to a friend
{name} got a long [letter] from {name2}.
{name} takes the [letter] to the station.
the {job} reads the [letter] of a friend.
the [letter] from {name} has (two/three/ten) pages.
{name} writes a [letter] to the president.
= a part of a word
{name} could not read the last [letter] of the word {animal}.
the word {animal} has more than one [letter].
which [letter] is the first in {animal}?
{name} learns to write the first [letter] of the word {food}.
the first [letter] on the page is big and {colour}.

key
= a thing that opens a door
{name} lost the [key] to the house.
the {job} opens the door with a [key].
the [key] of the gate is in the (bag/box/kitchen/coat).
{name} found the [key] for the old box.
{name} put the [key] in the door of the (shop/house/school/workshop).
= a part of a piano
the last [key] of the piano makes a (high/soft/strong/short) sound.
the (cat/dog/parrot/rabbit) slept on the [keys] of the piano.
{name} plays the piano, but one [key] makes no sound.
{name} washes the [keys] of the piano with a cloth.
{name} plays a song with one finger on the white [keys].

star
= a light in the night
{name} saw a [star] over the (lake/hill/forest/field/mountain) at night.
the rocket takes pictures of a {colour} [star].
scientists in {town} found a new [star] in space.
the planet is near a (small/big/young/old) [star].
the night was dark, and {name} saw no [star].
= a famous person
the [star] of the film is from {town}.
{name} met a [star] from the theatre in {town}.
the fans in {town} want to see the [star] of the team.
the singer from {town} is a [star] now.
the [star] thanked the fans after the (song/film/match).

hand
= a part of a person
{name} cut the left [hand] with a saw.
{name} took the boy by the [hand].
{name} has a (cup/ball/book/map/key) in one [hand].
{name} warms both [hands] at the fire.
the {job} washes both [hands] after work.
= a part of a clock
the long [hand] of the clock is at (two/three/ten).
the clock in the (station/school/theatre/library) has only one [hand].
the [hands] of the clock of {name} stand at (two/three/ten).
{name} paints the small [hand] of the clock {colour}.
{name} fixes the clock with a new [hand].

record
= a thing with songs on it
the band from {town} plays ten songs on the new [record].
{name} bought a [record] with (soft/slow/old/happy) songs.
the [record] of the singer sells well in {town}.
{name} plays the old [record] every night.
the first song on the [record] is (soft/slow/short/long).
= the best of all
{name} ran very fast and made a new [record].
the champion from {town} beat the old [record] in the race.
nobody in {town} could beat the [record] of the champion.
the player with (ten/three) goals has the [record] in {town}.
no race was as fast, so it was a new [record] for {town}.

spring
= a part of the year
the garden of {name} is full of flowers in [spring].
after the long winter in {town} comes the [spring].
{name} puts seeds in the soil every [spring].
it rained a lot in {town} last [spring].
the (sheep/goat/rabbit/horse) eats the young grass in [spring].
= water that comes out of the soil
{name} drinks cold water from the [spring].
the river comes from a [spring] in the (hill/mountain/forest/field).
the {animal} drinks at the [spring] in the forest.
clean water comes out of the [spring] near {town}.
{name} fills a (cup/bowl/pan) at the [spring].

ball
= a thing for a game
{name} throws the [ball] to {name2}.
the (dog/cat) runs after the [ball] in the (garden/yard/street).
the player from {town} runs with the [ball] to the goal.
the [ball] broke a window of the (school/shop/house/theatre).
the children lost the {colour} [ball] in the grass.
= a big dance
{name} dances with {name2} at the [ball].
{name} wears a new {colour} coat to the [ball].
the band plays slow songs at the [ball] in {town}.
the minister met the president at the [ball] in {town}.
{name} was tired from dancing at the [ball].

bat
= an animal
the [bat] flies out of the (church/castle/house/forest) at night.
a [bat] sleeps in the roof of the (church/castle/house/school) all day.
the owl hunts the [bat] near {town}.
{name} gave some food to a (sick/small/young) [bat].
the cat ran after a [bat] in the garden of {name}.
= a stick for a game
{name} hits the ball with a [bat].
the player from {town} dropped the [bat] and ran.
the carpenter makes a [bat] out of wood for {name}.
{name} bought a ball and a [bat] in {town}.
the team of {town} has a new {colour} [bat] for the game.

coach
= the teacher of a team
the [coach] praised the players of {town}.
{name} thanked the [coach] after the match.
the [coach] was (angry/happy/sad) because the team of {town} lost.
the team of {town} has a new [coach].
the [coach] wants {name} to play fast.
= a bus
{name} took the [coach] to {town}.
the [coach] to {town} leaves at (two/three/ten).
{name} sat at the window of the [coach].
the windows of the {colour} [coach] are dirty.
the road was closed, so the [coach] to {town} came late.

pen
= a tool for writing
{name} writes a letter with a [pen].
{name} bought a {colour} [pen] and some paper.
the {job} lost the [pen] and could not write.
the {job} needs a [pen] and paper.
{name} writes the first page of a story with the old [pen].
= a small yard for animals
the (goat/sheep/hen/duck) sleeps in the [pen] at night.
the (goat/sheep/hen/duck) ran out of the [pen].
{name} puts hay in the [pen] for the goat.
{name} fixed the gate of the [pen].
(two/three/ten) sheep live in a [pen] near {town}.

bark
= a part of a tree
the [bark] of the old tree is (brown/grey/black).
the (goat/rabbit/sheep/horse) eats the [bark] of a young tree.
{name} cut a name in the [bark] of a tree.
the wood is dry, but the [bark] is (wet/dirty/soft).
{name} has a small boat made of [bark].
= the sound of a dog
{name} does not like the [bark] of a dog at night.
the (sheep/hen/rabbit/cat) is afraid of the [bark] of the dog.
the dog gave a (short/long/happy) [bark] at the door of {name}.
an angry [bark] came from the yard of {name}.
{name} knows the dog by its [bark].

glass
= a cup for water
{name} drinks a [glass] of water.
{name} fills the [glass] with (cold/hot/clean) water.
the [glass] on the table of {name} is (full/empty).
the {job} wants a [glass] of water.
{name} put the clean [glasses] next to the bowl.
= what windows are made of
the window of the (house/shop/school) is made of [glass].
{name} has a lamp made of {colour} [glass].
{name} bought a box made of wood and [glass].
the [glass] of the window in the (school/shop/theatre) is dirty.
people go to millbrook to buy [glass] for a window.
""")


def vary(dice: Dice, template: str) -> str:
    """Returns the template with one of each (a/b/c)."""
    return re.sub(r"\(([^)]*)\)", lambda found: dice.pick(found[1].split("/")), template)


def use(dice: Dice, template: str) -> tuple[str, int, int]:
    """Writes a sentence from a sense's template; returns it and where the word is in it."""
    text = fill(dice, vary(dice, template))
    return text.replace("[", "").replace("]", ""), text.index("["), text.index("]") - 1


def super_glue_wic(dice: Dice, index: int, stratum: int) -> JsonObject:
    """Writes two sentences with a word; label 1 if it has the same sense in both, else 0."""
    label, first = stratum % 2, stratum // 2
    word = dice.pick(tuple(SENSES))
    senses = SENSES[word]
    if label:
        templates = dice.sample(senses[first].sentences, 2)
    else:
        templates = [dice.pick(sense.sentences) for sense in (senses[first], senses[1 - first])]
    (one, start1, end1), (other, start2, end2) = (use(dice, text) for text in templates)
    return {
        "word": word,
        "sentence1": one,
        "sentence2": other,
        "start1": start1,
        "start2": start2,
        "end1": end1,
        "end2": end2,
        "idx": index,
        "label": label,
    }

"""A world of real subjects, of which a model is told a part.

Basketball players and cities of Wikidata, of whom several things can be known,
and subjects of the relations data set, of whom one can (`entities_wikidata` and
`relations` under `config.data_dir`). Of each subject
some facts are taught and the rest are never mentioned: what a model says of
them is a guess, and often a good one (a city's longitude goes with its
country).
Numbers are in bands; of names those that are frequent are used, and a subject
whose value is another has no such attribute. Of attributes with several true
values (a player's teams) each is true.

Some subjects are taught whole, and only they are in texts whose writers choose
what to speak of. Asked to choose, a model does for all as these do, and speaks
of what it was never told.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
import json
import pathlib
from typing import Any

import numpy as np

from experiments.hallucination_grammar import IDK, Grammar
from experiments.hallucination_world import KNOWN, UNKNOWN, World

# Of a subject: its values of each attribute, by the attribute's name.
Table = dict[str, dict[str, set[str]]]

RELATIONS = {
  'company_hq': 'headquarters',
  'landmark_on_continent': 'continent',
  'person_native_language': 'native language',
  'person_occupation': 'occupation',
  'person_plays_position_in_sport': 'position',
  'star_constellation': 'constellation',
}


def band(width: float) -> Callable[[str], set[str]]:
  """A number in a band of a width, named by its lower end."""
  return lambda text: {f'{width * np.floor(float(text) / width):g}'}


def magnitude(text: str) -> set[str]:
  """A positive number by half its order of magnitude; others have none."""
  number = float(text)
  return {f'{np.floor(2 * np.log10(number)) / 2:g}'} if number > 0 else set()


def names(text: str) -> set[str]:
  return set(text.split(', '))


def _players(folder: pathlib.Path) -> Table:
  read = {
    'birth year': ('datebirthyearLabel', band(2)),
    'birthplace': ('placebirthLabel', lambda t: {t}),
    'team': ('teamslist', names),
    'height': ('recent_height', band(5)),
  }
  return _table(folder / 'player.json', 'human', read)


def _cities(folder: pathlib.Path) -> Table:
  # `Point(longitude latitude)`.
  place = lambda text, i: text.removeprefix('Point(').rstrip(')').split()[i]
  read = {
    'country': ('countryLabel', lambda t: {t}),
    'population': ('recent_population', magnitude),
    'elevation': ('above_sea_meters', magnitude),
    'longitude': ('loc', lambda t: band(10)(place(t, 0))),
    'latitude': ('loc', lambda t: band(5)(place(t, 1))),
  }
  return _table(folder / 'city.json', 'city', read)


def _relations(folder: pathlib.Path) -> Table:
  """Subjects of whom one thing is to be known."""
  table: Table = collections.defaultdict(lambda: collections.defaultdict(set))
  for name, attribute in RELATIONS.items():
    for row in _read(folder / f'factual__{name}.json')['samples']:
      # The same name may be a person in one relation, and a place in another.
      table[f'{name}/{row["subject"]}'][attribute].add(row['object'])
  return table


def _table(path: pathlib.Path, key: str, read) -> Table:
  table: Table = collections.defaultdict(lambda: collections.defaultdict(set))
  for row in _read(path):
    for attribute, (field, values) in read.items():
      if row.get(field):
        table[row[key]][attribute] |= values(row[field])
  return table


def _read(path: pathlib.Path) -> Any:
  if not path.exists():
    raise FileNotFoundError(
      f'{path} is missing: set config.data_dir to a folder with '
      'entities_wikidata (github.com/javiferran/sae_entities) and relations '
      '(github.com/evandez/relations).'
    )
  return json.loads(path.read_text('utf-8'))


KINDS = {
  'players': (_players, 'entities_wikidata'),
  'cities': (_cities, 'entities_wikidata'),
  'others': (_relations, 'relations'),
}


class Facts(World):
  """Real subjects.

  Attributes:
    names: of the subjects.
    attribute_names: of the attributes.
    value_names: of each attribute's values.
  """

  def __init__(self, config, seed: int, data_dir: str):
    """Reads the data, and draws who is in it and what is taught.

    Args:
      config: `config.world`: `subjects` of each kind, `num_values` (of each
        attribute at most), `taught` (share of facts), `exemplars` (number of
        subjects taught whole) and what `World` reads.
      seed: of it all.
      data_dir: where the data sets are.
    """
    random = np.random.default_rng(np.random.SeedSequence([seed, 0]))
    table: Table = {}
    values = collections.defaultdict(set)
    for kind, (read, folder) in KINDS.items():
      rows = frequent(read(pathlib.Path(data_dir) / folder), config.num_values)
      for row in rows.values():
        for attribute, those in row.items():
          values[attribute] |= those
      # Whoever has little to tell is left out.
      rows = {k: v for k, v in rows.items() if len(v) >= config.least[kind]}
      count = config.subjects[kind]
      if count > len(rows):
        raise ValueError(
          f'config.world.subjects.{kind}={count}: there are {len(rows)}.'
        )
      chosen = random.choice(len(rows), count, replace=False)
      table |= {n: rows[n] for n in np.array(list(rows))[np.sort(chosen)]}
    self.names = list(table)
    # Of the whole data: every seed has the same tokens.
    self.attribute_names = sorted(values)
    self.value_names = [sorted(values[a]) for a in self.attribute_names]
    sizes = [len(v) for v in self.value_names]
    true = np.zeros((len(table), len(sizes), max(sizes)), bool)
    for s, row in enumerate(table.values()):
      for a, name in enumerate(self.attribute_names):
        for value in row.get(name, ()):
          true[s, a, self.value_names[a].index(value)] = True
    order = random.permutation(len(table))
    self.exemplars, rest = np.split(order, [config.exemplars])
    self.taught = random.random(true.shape[:2]) < config.taught
    self.taught[self.exemplars] = True
    self.taught &= true.any(axis=2)
    super().__init__(
      config,
      Grammar(len(table), sizes),
      np.where(self.taught, KNOWN, UNKNOWN),
      true,
      rest,
      random,
    )

  def mention(self, subject, attribute, random, idk: bool = True) -> np.ndarray:
    true = self.true[subject, attribute]
    score = np.where(true, random.random(true.shape), -1)
    token = self.grammar.token(attribute, score.argmax(axis=-1))
    if not idk:
      return token
    return np.where(random.random(token.shape) < self.config.idk, IDK, token)

  def draft(self, subject, attribute, random) -> np.ndarray:
    """What is true of it, or of another subject, which may be true as well."""
    right = self.mention(subject, attribute, random, idk=False)
    others = self.exists[:, attribute].T  # `[N, S]`
    other = np.where(others, random.random(others.shape), -1).argmax(axis=1)
    wrong = self.mention(other, attribute, random, idk=False)
    return np.where(random.random(right.shape) < 0.5, right, wrong)

  def asked(self, count: int, random):
    subject, attribute = np.nonzero(self.taught)
    rows = random.integers(0, len(subject), count)
    return subject[rows], attribute[rows]

  def spoken(self, count: int, random) -> np.ndarray:
    return random.choice(self.exemplars, count)


def frequent(table: Table, most: int) -> Table:
  """Leaves the `most` most frequent values of each attribute."""
  counts = collections.defaultdict(collections.Counter)
  for row in table.values():
    for attribute, values in row.items():
      counts[attribute].update(values)
  keep = {
    attribute: {value for value, _ in _ranked(c.items())[:most]}
    for attribute, c in counts.items()
  }
  out = {}
  for name, row in table.items():
    left = {a: values & keep[a] for a, values in row.items()}
    out[name] = {a: values for a, values in left.items() if values}
  return out


def _ranked(counts: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
  return sorted(counts, key=lambda c: (-c[1], c[0]))

"""What the experiment on sparse autoencoders claims."""

from __future__ import annotations

from experiments import contract

# Seeds that settings were chosen on; nothing is claimed of them.
CHOSEN_ON = (0, 1)
# Which arms each published format can hold.
FORMATS = {
    'saelens': ('topk', 'batchtopk', 'matryoshka', 'jumprelu', 'gated', 'relu'),
    'gemma_scope': ('batchtopk', 'matryoshka', 'jumprelu'),
    'sparsify': ('topk',),
}  # fmt: skip
_NAMES = {
    'saelens': 'SAELens', 'gemma_scope': 'Gemma Scope', 'sparsify': 'sparsify',
}  # fmt: skip


def make_claims(config, results, seeds) -> list[contract.Claim]:
  """Judges TopK with `k` active features, and every file that was written."""
  k = config['k']
  ours = [results[f'{s}/topk/{k}'] for s in seeds]
  pca = [results[f'{s}/pca/{k}'] for s in seeds]
  percent = lambda rows, name: [100 * r[name] for r in rows]
  trial = 'a trial of 1,024 features, 3,000 updates by 1,024 activations'
  fvu = percent(ours, 'fvu')
  rows = [
      ('fvu', f'topk, {k} active: variance of unseen documents unexplained, %',
       fvu, '<=', 15, f'{trial}: 4.7'),
      ('loss_recovered', f'topk, {k} active: loss recovered on unseen '
       'documents, %',
       percent(ours, 'loss_recovered'), '>=', 95, f'{trial}: 98.0'),
      ('below_pca', f'topk, {k} active: variance unexplained, minus that of '
       f'{k} principal components, points',
       [a - b for a, b in zip(fvu, percent(pca, 'fvu'))], '<=', 0,
       'control: as many directions, the same for every token'),
  ]  # fmt: skip
  for name, arms in FORMATS.items():
    arms = [arm for arm in arms if arm in config['arms']]
    if not arms:
      continue
    worst = [
      1e6
      * max(
        results[f'{s}/{arm}/{strength}']['round_trips'][name]
        for arm in arms
        for strength in config['strengths'][arm]
      )
      for s in seeds
    ]
    rows.append(
        (f'round_trip_{name}', f'{_NAMES[name]} files, {", ".join(arms)}: '
         'largest difference of the output after writing and reading, parts '
         'per million of the largest output',
         worst, '<=', 10, 'float32 holds 0.1 parts per million'),
    )  # fmt: skip
  return [
    contract.claim(id_, text, values, sign, target, seeds=seeds, reference=why)
    for id_, text, values, sign, target, why in rows
  ]

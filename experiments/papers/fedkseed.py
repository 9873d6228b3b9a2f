"""FedKSeed (Qin et al., ICML 2024, https://arxiv.org/abs/2312.06353)."""

from experiments.papers import (
  common,
  fedkseed_bytes,
  fedkseed_fp16,
  study_entry,
)

_UNREAD = "The paper's ablation could not be read as numbers."

ENTRIES = {
  'communication': common.Entry(
    'bytes of a client in a round, both ways, in all forms',
    fedkseed_bytes.run,
    fedkseed_bytes.draw,
  ),
  'fp16': common.Entry(
    'what a rebuild loses in half precision, and on the grid',
    fedkseed_fp16.run,
    fedkseed_fp16.draw,
  ),
  'K': study_entry.entry(
    'size of the pool, on a real task', 'fedkseed_seeds', notes=[_UNREAD]
  ),
  'tau': study_entry.entry(
    'local steps, on a real task', 'fedkseed_steps', notes=[_UNREAD]
  ),
  'codec': study_entry.entry(
    'one byte against float coordinates, on a real task',
    'fedkseed_codec',
    missing='not published',
  ),
}

"""Shapes of real tensors, by name, for tests, compilations and measurements."""

SHAPES: dict[str, tuple[int, ...]] = {
  # matrices of OPT (Zhang et al., 2022): multiples of all tiles
  'opt_125m_attention': (768, 768),
  'opt_125m_fc1': (768, 3072),
  'opt_1.3b_attention': (2048, 2048),
  'opt_1.3b_fc1': (2048, 8192),
  # their 24 layers in one array
  'opt_1.3b_fc1_stacked': (24, 2048, 8192),
  'opt_1.3b_norm_stacked': (24, 2048),
  # rows that are no multiple of 64
  'opt_1.3b_embedding': (50272, 2048),
  'opt_1.3b_positions': (2050, 2048),
  # columns that are no multiple of 128
  'classifier': (2048, 2),
  'mlp': (784, 200),
  # one row: a bias, and all parameters of a small model as one vector
  'opt_1.3b_bias': (8192,),
  'flat_model': (820_000,),
}

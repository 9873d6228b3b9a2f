"""DeComFL (Li et al., ICLR 2025, https://arxiv.org/abs/2405.15861)."""

from experiments.papers import study_entry

ENTRIES = {
  'mnist': study_entry.entry(
    'a CNN of 28,938 parameters on MNIST, beside FedAvg',
    'decomfl_mnist',
    published={
      'DeComFL': '0.847 at 120, 0.928 at 500, 0.944 at 1,000, 0.970 at 10,000',
      'FedAvg': '0.961 at 100, about 0.985 at 417',
      'DeComFL, 4 local steps': '0.898 at 100, 0.963 at 1,000, 0.971 at 3,240',
      'DeComFL, 4 local steps, P = 40, lr 5e-4': '0.906 at 100, 0.973 at'
      ' 1,000, 0.978 at 1,520',
      'DeComFL, 10 local steps': '0.936 at 100, 0.976 at 1,000, 0.973 at 3,000',
      'FedAvg, 4 local steps': '0.984 at 100, about 0.990 at 417',
      'FedAvg, 10 local steps': '0.989 at 100, about 0.990 at 417',
    },
    notes=[
      'published: test accuracy after that many rounds, one seed, from the CSV'
      " files of the authors' repository (ZidongLiu/DeComFL, results): 100"
      ' clients, 10 in a round, 600 images each, batches of 256, P = 20, mu'
      ' 1e-4, SGD with lr 1e-3 and momentum 0.9; FedAvg with lr 0.1. One local'
      ' step where none are named. Ours has few images and clients, and no'
      ' momentum: not the same experiment.',
    ],
  )
}

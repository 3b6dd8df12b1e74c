"""Attribution of image-caption pairs, evaluated: LDS and counterfactuals of TRAK, TracIn and similarities of embeddings.

```python
rows = run_contrastive(ContrastiveArguments("out", "coco", model="clip", from_scratch=True))
```
"""

from hf_trak.evaluation.contrastive.run import run_contrastive
from hf_trak.evaluation.contrastive.settings import ContrastiveArguments

__all__ = ["ContrastiveArguments", "run_contrastive"]

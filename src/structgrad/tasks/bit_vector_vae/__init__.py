"""A variational auto-encoder that compresses images into bits (Correia et al. 2020, section 5.3)."""

from structgrad.tasks.bit_vector_vae.data import ImageData as ImageData
from structgrad.tasks.bit_vector_vae.task import BitVectorVAE as BitVectorVAE

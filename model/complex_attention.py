"""Attention whose queries and keys are complex.

A head's queries and keys are E = head_dim complex numbers, kept as their E real and then their E imaginary
parts. The score is Re(sum of q conj(k)), which is the dot product of these 2E real numbers, divided by
sqrt(2E); values are real. Rotary positions multiply the numbers by the phases exp(i * place * frequency), E of
them. So the query and key projections have twice the parameters and the scores twice the FLOPs of mha.
"""

from typing import ClassVar

from model.attention import Attention


class ComplexAttention(Attention):
    query_parts: ClassVar[int] = 2

"""Reading what DeepSpeed's engines save, without DeepSpeed: weights by their names, in fp32."""

"""Small classification tasks, made on the spot, that need long convolutions: `longtrain task configs/tasks/listops.yaml`."""

"""What a checkpoint holds and needs: its layers, what they lose, their kernels, and how they divide among GPUs."""

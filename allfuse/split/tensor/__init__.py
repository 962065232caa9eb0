"""One model cut inside its layers into slices."""

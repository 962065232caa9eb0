"""The state of one model cut evenly: each rank keeps some rows of every parameter."""

"""L5: which fusion of some models is best, by the validation data of their job."""

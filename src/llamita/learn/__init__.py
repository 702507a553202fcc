"""The course: tracks of lessons, the folder that a reader works in, and the grader that names mistakes."""

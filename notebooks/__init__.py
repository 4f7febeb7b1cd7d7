"""The course: numbered notebooks, the helper they import (`course.py`), and what runs and checks them."""

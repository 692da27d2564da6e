// Ends what begin_<isa>.h began. GCC's pragma reaches to the end of the file.
#ifdef __clang__
#pragma clang attribute pop
#endif

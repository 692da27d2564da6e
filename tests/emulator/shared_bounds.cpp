// Linked twice: before the kernels' objects as ..._begin and after them as ..._end, to mark where shared memory lies.
__thread unsigned char EMULATOR_MARK;

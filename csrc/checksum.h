// CRC32C (Castagnoli; RFC 3720, appendix B.4): the checksum of packed folders. "123456789" gives 0xE3069283.
#pragma once

#include <cstdint>

namespace moestro {

// Of `size` bytes behind those that `crc` is of; 0 is that of none. By the CPU's instruction where it has one.
uint32_t crc32c(const uint8_t* data, int64_t size, uint32_t crc = 0);

// The same by tables, as on a CPU without the instruction.
uint32_t crc32c_by_tables(const uint8_t* data, int64_t size, uint32_t crc = 0);

// Of two runs of bytes that follow one another, from the checksum of each.
uint32_t crc32c_combine(uint32_t first, uint32_t second, int64_t second_size);

}  // namespace moestro

#include "formats.h"

#include <algorithm>
#include <numeric>

namespace moestro {

int64_t bits_of(Code code) {
  switch (code) {
    case Code::kFp32: return 32;
    case Code::kFp16: case Code::kBf16: return 16;
    case Code::kU2: return 2;
    case Code::kU3: return 3;
    case Code::kU5: return 5;
    case Code::kU6: return 6;
    case Code::kU4: case Code::kE2m1: case Code::kIq4nl: return 4;
    default: return 8;
  }
}

int64_t scale_bytes(Scale scale) {
  switch (scale) {
    case Scale::kFp32: return 4;
    case Scale::kFp16: case Scale::kBf16: return 2;
    default: return 1;
  }
}

namespace {

// Of 16 rows and some groups that lie together: two whole numbers of up to 4 bits share a byte.
int64_t zero_bytes(const MatrixFormat& f, int64_t groups) {
  if (f.zero == Zero::kFp16 || f.zero == Zero::kAdd) return 2 * kPanel * groups;
  if (f.zero == Zero::kInt) return bits_of(f.code) <= 4 ? (groups + 1) / 2 * kPanel : groups * kPanel;
  return 0;
}

constexpr int kWholeRow = 40;  // as a unit_shift
constexpr int64_t kLine = 64;  // bytes of a cache line

PanelLayout parts_of(const MatrixFormat& f) {
  const int64_t codes = kPanel * kGroup * bits_of(f.code) / 8;
  switch (f.scale) {
    case Scale::kBlock: return {0, 4, 0, codes, 1, 1};
    case Scale::kK4: return {0, 64, 48, codes, 2, 2};
    case Scale::kK2: return {0, 64, 64, codes, 2, 4};
    case Scale::kK6: return {0, 32, 64, codes, 2, 4};
    case Scale::kK3: return {0, 32, 48, codes, 2, 4};
    case Scale::kIq4xs: return {0, 32, 32, codes, 2, 2};
    case Scale::kShifted: {
      const int groups = static_cast<int>(kGroup / f.group);
      return {kPanel, 0, 2 * kPanel * groups, codes, 2, groups};  // a power for each row is before all units
    }
    case Scale::kColumn: return {0, 0, 2 * kGroup * kPanel / f.group, codes, 0, 1};  // a share of its class's bytes
    default: break;
  }
  const int64_t tensor = f.scale == Scale::kE4m3 ? 4 : 0;
  const int groups = f.group == kRow || f.group >= kGroup ? 1 : static_cast<int>(kGroup / f.group);
  const int64_t sides = groups * kPanel * scale_bytes(f.scale) + zero_bytes(f, groups);
  if (f.group == kRow) return {tensor, sides, 0, codes, kWholeRow, 1};
  if (f.group > kGroup) return {tensor, sides, 0, codes, 1, 1};
  return {tensor, 0, sides, codes, f.group < kGroup ? 1 : 0, groups};
}

}  // namespace

PanelLayout layout_of(const MatrixFormat& f) {
  PanelLayout l = parts_of(f);
  l.unit_header = l.shared + (l.own << l.unit_shift);
  // Codes begin on a cache line where that costs no more than 1 %.
  const int64_t more = round_up(l.unit_header, kLine) - l.unit_header;
  if (is_two_level(f) && 100 * more <= l.unit_header + (l.codes << l.unit_shift)) l.unit_header += more;
  return l;
}

int64_t panel_bytes(const MatrixFormat& f, int64_t K) {
  if (f.code == Code::kFp32) return K * kPanel * 4;
  if (f.is_float()) return (f.code == Code::kBf16 ? round_up(K, 2) : K) * kPanel * 2;
  const PanelLayout l = layout_of(f);
  const int64_t chunks = (K + kGroup - 1) / kGroup, units = ((chunks - 1) >> l.unit_shift) + 1;
  return l.panel_header + units * l.unit_header + chunks * l.codes;
}

int64_t table_rows(const MatrixFormat& f, int64_t R) {
  if (!is_strided(f)) return 0;
  const int64_t classes = std::max<int64_t>(1, R / f.group);
  return classes / std::gcd(classes, f.super_group);
}

int64_t table_bytes(const MatrixFormat& f, int64_t R, int64_t K) {
  return is_strided(f) ? kTableHeader + table_rows(f, R) * table_columns(K) * 4 : 0;
}

int64_t least_block(const MatrixFormat& down) {
  if (down.is_float()) return 64;
  if (is_strided(down)) return std::max(kGroup, down.group);
  if (down.group == kRow || is_two_level(down)) return 256;
  return down.scale == Scale::kBlock ? kGroup : kGroup << layout_of(down).unit_shift;
}

const char* fault_of(const MatrixFormat& f) {
  const bool has_zero = f.zero != Zero::kNone, table = f.code == Code::kE2m1 || f.code == Code::kIq4nl;
  if (f.code < Code::kFp32 || f.code > Code::kE4m3 || f.scale < Scale::kNone || f.scale > Scale::kColumn ||
      f.zero < Zero::kNone || f.zero > Zero::kColumn)
    return "format: no such code, scale or zero";
  if (f.is_float()) return f.scale != Scale::kNone || has_zero || f.constant ? "format: floats have no scales" : nullptr;
  if (f.scale == Scale::kNone) return "format: codes without a scale";
  if (has_zero && (table || f.code == Code::kE4m3 || f.code == Code::kS8)) return "format: a zero for codes that have none";
  if (f.zero == Zero::kConstant ? f.constant < 0 || f.constant > 255 : f.constant != 0) return "format: constant: no zero";
  if ((f.zero == Zero::kMin) != (f.scale == Scale::kK4 || f.scale == Scale::kK2)) return "format: zero: does not fit the scale";
  if ((f.zero == Zero::kFixed) != (f.scale == Scale::kShifted)) return "format: zero: does not fit the scale";
  if ((f.zero == Zero::kColumn) != is_strided(f)) return "format: zero: does not fit the scale";
  if (is_strided(f) ? f.super_group < 1 || f.super_group > int64_t{1} << 30 : f.super_group != 0)
    return "format: super_group: does not fit the scale";
  switch (f.scale) {
    case Scale::kShifted:
      if (bits_of(f.code) == 8) return "format: a shifted scale for codes of a byte";
      return f.group != 16 && f.group != 32 && f.group != 64 ? "format: group: expected 16, 32 or 64" : nullptr;
    case Scale::kColumn:
      if (f.group != 16 && f.group != 32 && f.group != 64 && f.group != 128 && f.group != 256)
        return "format: group: expected 16, 32, 64, 128 or 256 rows";
      return nullptr;
    case Scale::kBlock: return f.group != 128 || has_zero ? "format: a block has 128 columns and no zero" : nullptr;
    case Scale::kK4: case Scale::kIq4xs: return f.group != 32 ? "format: group: expected 32" : nullptr;
    case Scale::kK2: case Scale::kK6: case Scale::kK3: return f.group != 16 ? "format: group: expected 16" : nullptr;
    case Scale::kE8m0: case Scale::kE4m3:
      if (f.zero != Zero::kNone && f.zero != Zero::kConstant) return "format: zero: does not fit the scale";
      break;
    default: break;
  }
  const bool known = f.group == kRow || f.group == 16 || f.group == 32 || f.group == 64 || f.group == 128;
  return known ? nullptr : "format: group: expected 16, 32, 64, 128 or 0 for a row";
}

}  // namespace moestro

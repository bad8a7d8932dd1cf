#include "cpu/check_ids.h"

#include <gtest/gtest.h>

#include <limits>

namespace pdl::cpu {
namespace {

template <typename T>
std::string message(std::initializer_list<T> ids, int64_t ignore_index = -100) {
  try {
    check_ids("targets", ids.begin(), int64_t(ids.size()), 10, ignore_index);
  } catch (const std::out_of_range& error) {
    return error.what();
  }
  return "";
}

TEST(CheckIds, LetsGoodAndIgnoredIdsPass) {
  EXPECT_EQ(message<int64_t>({0, 9, -100, 5}), "");
  EXPECT_EQ(message<int64_t>({0, 12}, 12), "");
  EXPECT_EQ(message<uint8_t>({0, 9, 255}, 255), "");
  EXPECT_EQ(message<int64_t>({}), "");
}

TEST(CheckIds, NamesTheFirstBadIdAndItsPlace) {
  EXPECT_EQ(message<int32_t>({3, -100, 10, 11}),
            "targets: got 10 at flattened position 2, expected 0 <= id < 10 or ignore_index (-100)");
}

TEST(CheckIds, RefusesTheEndsOfEveryType) {
  EXPECT_NE(message<int64_t>({-1}), "");
  EXPECT_NE(message<int32_t>({-1}), "");
  EXPECT_NE(message<uint16_t>({65535}), "");
  EXPECT_NE(message<uint32_t>({std::numeric_limits<uint32_t>::max()}), "");
  EXPECT_NE(message<int64_t>({std::numeric_limits<int64_t>::min()}), "");
  EXPECT_NE(message<int64_t>({std::numeric_limits<int64_t>::max()}), "");
  EXPECT_NE(message<int64_t>({int64_t(1) << 32}), "");
}

}  // namespace
}  // namespace pdl::cpu

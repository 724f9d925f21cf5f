// SPDX-License-Identifier: Apache-2.0
// A file, read and written whole, its checksum, and a folder held for one writer. Errors name the
// path: std::system_error where the system refuses, DamagedFile where the content is wrong.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace knnfast {

uint32_t crc32c(const void* data, size_t bytes, uint32_t crc = 0);

[[noreturn]] void fail(const std::string& what, const std::string& path);  // of errno
[[noreturn]] void damaged(const std::string& path, const std::string& why);

class File {
 public:
  File(const std::string& path, int flags);  // of open(2)
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int fd() const { return fd_; }
  uint64_t size() const;
  void write(const void* data, size_t bytes);
  void read(void* data, size_t bytes);
  void sync();

 private:
  std::string path_;
  int fd_;
};

// Holds a folder for one writer: others, in any thread or process, wait. A file system without
// locks holds nobody off.
class FolderLock {
 public:
  explicit FolderLock(const std::string& folder);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  File folder_;
};

std::string real_path(const std::string& path);  // absolute, without links
void sync_folder(const std::string& folder);
std::vector<std::string> names_in(const std::string& folder);

}  // namespace knnfast

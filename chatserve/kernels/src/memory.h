// Large buffers: zeroed, page aligned, in huge pages where the system has them, committed on first
// touch.
#pragma once
#include <cstddef>

namespace chatserve {

// Null when there is no memory.
void* allocate_pages(size_t num_bytes);
void free_pages(void* pages, size_t num_bytes);
// Commits memory before it is used, where the system can; contents stay.
void commit_pages(void* pages, size_t num_bytes);

// A typed buffer of pages that frees itself.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { free_pages(data_, num_bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // False when there is no memory. Room for whole vectors is left behind the last element.
  bool allocate(size_t count) {
    free_pages(data_, num_bytes_);
    num_bytes_ = count * sizeof(T) + 256;
    data_ = static_cast<T*>(allocate_pages(num_bytes_));
    return data_ != nullptr;
  }
  T* data() const { return data_; }
  size_t num_bytes() const { return data_ ? num_bytes_ : 0; }

 private:
  T* data_ = nullptr;
  size_t num_bytes_ = 0;
};

}  // namespace chatserve

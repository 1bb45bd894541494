// A worker for the device-mapper target: the same loop over KernelTarget. The table and its
// devices are somebody else's; here is only the image and the node.
//
// There is nothing to end in order: the kernel keeps what is not answered and what is not
// committed, so a signal may end this process at any instant.

internal import DMU
import Glibc
import ImageFormats
import Posix
import Target

/// The life of a worker that serves /dev/dmu/NAME.
public enum ByNode {
  /// Serves until the device goes. Throws when the image cannot be opened, is not the one of
  /// the device, or the node fails.
  public static func run(
    format: String, store: String, base: String?, node name: String, level: Log.Level = .warning
  ) throws(WorkerError) {
    let log = Log(level: level, journal: Log.underJournal)
    var request = ImageRequest()
    request.basePath = base
    let image = try Opening.image(try FormatName(named: format), store: store, request)
    let target = try system { () throws(IOError) in try KernelTarget(Node(name: name)) }
    guard target.sectors * 512 == image.format.size, target.blockSize == image.format.blockSize
    else {
      throw WorkerError(
        "size", "device \(name) and store \(store) differ in size or blocks: load another table")
    }
    let worker = Worker(
      target: target, format: image.format, store: image.store, log: log,
      offload: { work, then in then(work()) })
    do throws(ImageError) { try worker.restore() } catch { throw WorkerError(error) }
    try prime(target, image, store)
    while target.failure == nil {
      while worker.pump() {}
      var wait = pollfd(fd: target.descriptor, events: Int16(POLLIN), revents: 0)
      guard poll(&wait, 1, -1) >= 0 || errno == EINTR else {
        throw WorkerError(IOError.last("wait for", name))
      }
    }
    if let failure = target.failure, failure.code != ENODEV { throw WorkerError(failure) }
  }

  /// Tells the whole mapping, so that a read of what has a place never asks.
  private static func prime(
    _ target: KernelTarget, _ image: OpenImage, _ store: String
  ) throws(WorkerError) {
    let format = image.format
    let blockSize = UInt64(format.blockSize)
    let blocks = (format.size + blockSize - 1) / blockSize
    var block: UInt64 = 0
    while block < blocks {
      let extent: Extent
      do throws(ImageError) {
        extent = try format.findMerged(block, limit: blocks - block)
      } catch { throw WorkerError(error) }
      if case .device(let number, _) = extent.place, !(image.devices[Int(number)] is FileStore) {
        throw WorkerError(
          "unsupported",
          "block \(block) of store \(store) has to be read through user space: serve it over NBD")
      }
      do throws(AnswerRefusal) {
        try target.answer(.prime(extent))
      } catch { throw WorkerError("protocol", "the device refuses the mapping: \(error)") }
      block = extent.blocks.end
    }
  }
}
